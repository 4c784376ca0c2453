"""What transformers' TransfoXL computes, kept as fixtures in tests/models/transfoxl/.

transformers 4.37.2 is the last that runs TransfoXL, so this needs an environment of its own, which
`make test-transfoxl` makes. `python transfoxl_reference.py check` computes the fixtures again and
compares, and loads what we export; `python transfoxl_reference.py write` writes them.
"""

import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TransfoXLConfig, TransfoXLLMHeadModel

from models.convert import to_hugging_face
from models.transformer_xl import TransformerXL, TransformerXLConfig
from preprocessing.vocabulary import PROTTRANS_BERT

FIXTURES = Path(__file__).parent / "transfoxl"
SEGMENTS = (8, 5, 11)  # as long as the memory, shorter, and longer
SIZES = {
    "vocab_size": 30,
    "d_model": 16,
    "d_embed": 16,
    "n_layer": 2,
    "n_head": 2,
    "d_head": 6,  # 2 · 6 is not 16
    "d_inner": 24,
    "mem_len": 8,
    "cutoffs": [],
    "div_val": 1,
    "clamp_len": -1,
    "same_length": False,
    "dropout": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "same-length": {"same_length": True},
    "clamped": {"clamp_len": 5},
    "shared-biases": {"untie_r": False},
    "pre-norm": {"pre_lnorm": True},
    "empty-start": {},
}


def make(case: str, folder: Path) -> None:
    """Write a model with random weights, biases and norms too, and what it computes."""
    torch.manual_seed(list(CASES).index(case))
    model = TransfoXLLMHeadModel(
        TransfoXLConfig(**{**SIZES, **CASES[case]}, trainer_compatible=True)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.randint(5, 30, (3, sum(SEGMENTS) + 1))
    memory = [torch.zeros(0, 3, 16)] * 2 if case == "empty-start" else None
    log_probabilities, loss, start = [], torch.zeros(()), 0
    for length in SEGMENTS:
        output = model(input_ids=tokens[:, start : start + length], mems=memory)
        memory = output.mems
        targets = tokens[:, start + 1 : start + length + 1]
        loss = loss - output.prediction_scores.gather(-1, targets[..., None]).sum()
        log_probabilities.append(output.prediction_scores.detach())
        start += length
    loss.backward()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    computed = {
        "tokens": tokens,
        "log_probabilities": torch.cat(log_probabilities, dim=1),
        "memory": torch.stack([layer.transpose(0, 1) for layer in memory]),
        "loss": loss.detach(),
    }
    for name, parameter in model.named_parameters():  # each tensor once, under its first name
        computed[f"gradient.{name}"] = parameter.grad
    save_file(computed, folder / "computed.safetensors")


def check_export(folder: Path) -> None:
    """See that transformers loads our directories and computes what we do."""
    for number, changes in enumerate(
        (
            {},
            {"tied_output": False, "norm": "pre"},
            {"shared_biases": True, "same_length": True, "clamp_length": 4},
        )
    ):
        config = TransformerXLConfig(
            hidden_size=32,
            layers=2,
            heads=2,
            head_size=8,
            intermediate_size=48,
            memory_length=6,
            initial_memory="zeros",
            **changes,
        )
        torch.manual_seed(number)
        model = TransformerXL(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        out = folder / f"export-{number}"
        to_hugging_face(
            model.state_dict(), config, PROTTRANS_BERT.tokens, PROTTRANS_BERT.substitutes, out
        )
        reference, report = TransfoXLLMHeadModel.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), report
        ids = AutoTokenizer.from_pretrained(out)("mkvu Z", return_tensors="pt")["input_ids"]
        assert ids.tolist() == [[3, 21, 12, 8, 25, 25, 3]]
        memory = mems = None
        for start in (0, 4):
            segment = ids[:, start : start + 4]
            with torch.no_grad():
                theirs = reference(input_ids=segment, mems=mems)
                ours, memory = model(segment, memory)
            mems = theirs.mems
            torch.testing.assert_close(
                ours.log_softmax(-1), theirs.prediction_scores, rtol=1e-5, atol=1e-5
            )


def main() -> None:
    """Write the fixtures, or check them and our exports."""
    warnings.simplefilter("ignore", DeprecationWarning)
    action = sys.argv[1]
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            made, kept = Path(name) / case, FIXTURES / case
            make(case, made)
            if action == "write":
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(made, kept)
                continue
            for file in ("model.safetensors", "computed.safetensors"):
                torch.testing.assert_close(
                    load_file(made / file), load_file(kept / file), rtol=1e-4, atol=1e-5
                )
            print(f"{case}: as kept")
        check_export(Path(name))
    print(f"{len(CASES)} fixtures and 3 exports are right")


if __name__ == "__main__":
    main()
