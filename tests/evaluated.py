"""What the examples of evaluations need: held-out tokens, a model in a file, a folder of weights, a program.

torch is imported when they are made: some who use this module need none.
"""

from pathlib import Path

import numpy as np
import yaml

TESTS = Path(__file__).parent


def make_evaluated(folder: Path) -> None:
    """Writes them into a folder whose RUN is one of `ds_models.TinyModel`, which knows 13 tokens."""
    from made_models import save_llama
    from made_tokenizers import save_byte_level

    random = np.random.default_rng(0)
    for name, vocabulary in (("held_out", 13), ("web", 97), ("code", 97)):
        (folder / f"{name}.bin").write_bytes(random.integers(0, vocabulary, 700).astype("<u2").tobytes())
    model = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom ds_models import TinyModel as make\n"
    (folder / "model.py").write_text(model)
    (folder / "measure.py").write_text('print(\'{"results": {"accuracy": 0.5}}\')\n')
    loss = {"kind": "loss", "data": "held_out.bin", "model": "model.py:make", "sequence_length": 64}
    (folder / "evaluators.yaml").write_text(yaml.safe_dump([loss]))
    save_llama(folder / "HF_MODEL", vocab_size=300)
    save_byte_level(folder / "HF_MODEL")
