"""The mathematics of WSM: decay curves, merge coefficients, learning-rate schedules, and their names in DeepSpeed."""
