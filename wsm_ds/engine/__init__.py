"""Turns a plan into bytes. The only arithmetic and the only large reads and writes of the project are here."""
