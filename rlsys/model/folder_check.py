"""Whether the files of a model folder are complete and fit each other, read without torch.

Preflight asks this of folders on the driver's machine; the engines ask it again, since a model of
the hub, or a folder of another host, is only seen there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rlsys.model.families.base import HF_EMBEDDING, HF_OUTPUT, SCORE, weight_table
from rlsys.model.folder import read_json
from rlsys.model.keys import ignored_prose
from rlsys.model.other_kinds import quantized_as, quantized_problem
from rlsys.model.shape import ModelShape, read_model_config, read_model_shape
from rlsys.model.tokenizer_files import (
    TOKENIZER_FILES,
    chat_template,
    eos_token,
    eos_token_ids,
    num_token_ids,
    resize_remedy,
    token_ids,
)
from rlsys.model.weight_files import (
    INDEX,
    StoredTensor,
    indexed_names,
    read_header,
    weight_files,
)
from rlsys.problems import Problem, ProblemsError

_COMPARED_BYTES = 2**24
_FLOATS = ("F64", "F32", "F16", "BF16")
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""Old checkpoints hold the rotary frequencies, which follow from config.json."""
_MAX_NAMED = 3
_MAX_PADDING = 1024
"""Embeddings without a token that a vocabulary of any size may be filled up with."""


def check_model_folder(folder: Path, shape: ModelShape, *, has_prompts: bool) -> None:
    """Refuse a model folder with problems.

    Raises:
        ProblemsError: lists what `folder_problems` finds.
    """
    problems = folder_problems(folder, shape, has_prompts=has_prompts)
    if problems:
        raise ProblemsError(str(folder), list(map(Problem, problems)))


def folder_problems(folder: Path, shape: ModelShape, *, has_prompts: bool) -> list[str]:
    """What is missing, broken, or does not fit config.json, and what to do.

    Args:
        shape: the one in config.json.
        has_prompts: also check the tokenizer and the chat template, which write the prompts.
    """
    problems = list(weight_problems(folder, shape))
    return [*problems, *_tokenizer_problems(folder, shape)] if has_prompts else problems


def model_notes(folder: Path, *, num_labels: int | None = None) -> list[str]:
    """What a run ignores in config.json, and token ids that no text shows; as read_model_shape."""
    notes = []
    shape = read_model_shape(folder, may_bridge=True, num_labels=num_labels)
    if shape.num_mtp_layers:
        notes.append(
            f"{folder}: the layers from {shape.num_layers} on, which predict further tokens "
            "(num_nextn_predict_layers), are not trained and not sampled with; checkpoints hold "
            "them as they are here"
        )
    if shape.experts.has_sigmoid_router:
        notes.append(
            f"{folder}: the biases by which routers choose experts (e_score_correction_bias) stay "
            "as they are"
        )
    prose = ignored_prose(read_model_config(folder))
    if prose:
        notes.append(f"{folder / 'config.json'}: {', '.join(prose)} ignored")
    ids = set(token_ids(folder).values())
    gaps = max(ids) + 1 - len(ids) if ids else 0
    if gaps:
        notes.append(
            f"{gaps:,} ids below {max(ids):,} have no token in the tokenizer of {folder}: "
            "completions may hold them, and their text does not show them"
        )
    return notes


# --- weights -------------------------------------------------------------------------------------


def weight_problems(folder: Path, shape: ModelShape) -> Iterator[str]:
    """Missing or broken weight files, and tensors that do not fit config.json."""
    try:
        files, indexed = weight_files(folder), indexed_names(folder)
    except ValueError as error:
        yield str(error)
        return
    if not files:
        pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
        yield f"{folder} holds no .safetensors file, so no weights" + (
            f"; {pickled.name} is not read, because a pickle can run code: load it where you trust "
            "it, and save_pretrained writes safetensors"
            if pickled is not None
            else ""
        )
        return
    stored: dict[str, StoredTensor] = {}
    broken = []
    for file in files:
        try:
            stored |= read_header(file)
        except ValueError as error:
            broken.append(str(error))
    if indexed is not None:
        missing = sorted(indexed - {file.name for file in files})
        if missing:
            names = ", ".join(missing)
            broken.append(f"{folder} lacks {names}, which its index names: download it again")
        if "model.safetensors" not in indexed and (folder / "model.safetensors").is_file():
            broken.append(
                f"{folder} holds model.safetensors and {INDEX}, which does not name it: two sets "
                "of weights, of which transformers reads one and vLLM the other. Delete one of them"
            )
    if broken or shape.family.is_bridged:  # mcore-bridge knows which tensors the model has
        yield from broken
        return
    yield from _table_problems(folder, shape, stored)


def _table_problems(
    folder: Path, shape: ModelShape, stored: Mapping[str, StoredTensor]
) -> Iterator[str]:
    """How the stored tensors differ from the model in config.json."""
    expected = {
        name: hf_shape
        for row in weight_table(shape)
        for name, hf_shape in zip(row.hf_names, row.hf_shapes, strict=True)
    }
    if other_form := _other_form(stored.keys() - expected.keys(), shape):
        yield f"{folder}: {other_form}"
        return
    found = {name: tensor for name, tensor in stored.items() if name in expected}
    # A run that trains a score head gives one to a model that has none yet.
    missing = [name for name in expected if name not in stored and name != SCORE]
    if missing:
        hint = "weights and config.json are of different models, or the download is not complete"
        if missing == [HF_OUTPUT]:
            hint = (
                "set tie_word_embeddings to true in config.json if the output head is the embedding"
            )
        elif any(f"model.{name}" in expected for name in stored):
            hint = "its names lack `model.`: save the model by its class ...ForCausalLM"
        yield f"{folder} lacks {some(missing)}: {hint}"
    unknown = [
        name
        for name in stored
        if name not in expected
        and name != HF_OUTPUT
        and not name.endswith(_IGNORED_SUFFIX)
        and not shape.is_in_mtp_layer(name)
    ]
    if unknown:
        files = {stored[name].file for name in unknown}
        foreign = files.isdisjoint(tensor.file for tensor in found.values())
        yield (
            f"{folder}: {some(sorted(file.name for file in files))} holds {some(unknown)}, which "
            f"a {shape.model_type} of its config.json does not have: rlsys would leave them out, "
            "and compute another model"
            + (". Move the file elsewhere if it is not of this model" if foreign else "")
        )
    yield from _shape_problems(found, expected)
    for dtype in sorted({tensor.dtype for tensor in found.values()} - {*_FLOATS}):
        names = [name for name, tensor in found.items() if tensor.dtype == dtype]
        method = "fp8" if dtype.startswith("F8") else dtype
        yield (
            f"{found[names[0]].file}: {some(names)} stored as {dtype}: {quantized_problem(method)}"
        )
    if shape.tied and HF_OUTPUT in stored and HF_EMBEDDING in stored:
        embedding, output = stored[HF_EMBEDDING], stored[HF_OUTPUT]
        if embedding.dtype != output.dtype or not _same_bytes(embedding, output):
            yield (
                f"{output.file}: {HF_OUTPUT} differs from {HF_EMBEDDING}, and config.json has "
                "tie_word_embeddings = true, by which the output head is the embedding: set it to "
                f"false if the model was trained with a head of its own, else remove {HF_OUTPUT}"
            )


def _other_form(unknown: Collection[str], shape: ModelShape) -> str | None:
    """What the weights are where a family's names are not to be expected, and what to do."""
    quantized = quantized_as(unknown)
    if quantized is not None:
        return quantized_problem(quantized)
    fused = sorted(name for name in unknown if name.endswith(".mlp.experts.gate_up_proj"))
    if not fused or not shape.is_moe:
        return None
    return (
        f"all experts of a layer are one tensor ({some(fused)}), and rlsys reads one for each: "
        "write them so with transformers (`old = AutoModelForCausalLM.from_pretrained(FOLDER); "
        "new = AutoModelForCausalLM.from_config(old.config, dtype=old.dtype); "
        "new.load_state_dict(old.state_dict()); new.save_pretrained(NEW)`), and copy the tokenizer"
    )


def _shape_problems(
    found: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    wrong = [name for name, tensor in found.items() if tensor.shape != expected[name]]
    if SCORE in wrong:
        wrong.remove(SCORE)
        outputs, trained = found[SCORE].shape[0], expected[SCORE][0]
        yield (
            f"{found[SCORE].file}: the score head has {outputs} outputs, and the run trains "
            f"{trained}: set reward_model.num_labels to {outputs}, or start from a model without a "
            "score head"
        )
    for name in wrong[:_MAX_NAMED]:
        more = len(wrong) - _MAX_NAMED
        yield (
            f"{found[name].file}: {name} has shape {list(found[name].shape)}, by config.json it is "
            f"{list(expected[name])}: weights and config.json are of different models"
            + (", or only one has the resized vocabulary" if name == HF_EMBEDDING else "")
            + (f"; {more} more are like it" if more > 0 and name == wrong[0] else "")
        )


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    num_bytes = one.end - one.start
    if num_bytes != other.end - other.start:
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        for start in range(0, num_bytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, num_bytes - start)
            if left.read(size) != right.read(size):
                return False
    return True


def some(names: Sequence[str]) -> str:
    """`a, b, c and 7 more`."""
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- tokenizer -----------------------------------------------------------------------------------


def _tokenizer_problems(folder: Path, shape: ModelShape) -> Iterator[str]:
    broken = list(unreadable(folder))
    if broken:
        yield from broken
        return
    if not (folder / "tokenizer.json").is_file() and not any(folder.glob("*.model")):
        yield f"{folder} holds no tokenizer.json, so no tokenizer"
        return
    yield from vocabulary_problems(folder, shape)


def vocabulary_problems(folder: Path, shape: ModelShape) -> Iterator[str]:
    """Tokens that the model needs and has no embedding for, and embeddings of another tokenizer."""
    template, eos, size = chat_template(folder), eos_token(folder), shape.vocab_size
    known = num_token_ids(folder)
    if known is not None and size - known > max(_MAX_PADDING, known // 8):
        yield (
            f"{folder}: the model has embeddings for {size:,} tokens (vocab_size in config.json) "
            f"and its tokenizer {known:,} tokens, {size - known:,} fewer, which is more than "
            "padding: use the tokenizer that the model was trained with"
        )
    outside = {token: i for token, i in token_ids(folder).items() if i >= size}
    for token, token_id in sorted(outside.items(), key=lambda entry: entry[1]):
        if token in template or token == eos:
            role = "chat template writes the token" if token in template else "eos_token is"
            yield (
                f"{folder}: its {role} {token!r} of id {token_id}, and "
                f"the model has embeddings for {size:,} tokens (vocab_size in config.json), ids 0 "
                f"to {size - 1:,}. {resize_remedy(max(outside.values()) + 1)}"
            )
    for file, token_id in eos_token_ids(folder):
        if type(token_id) is not int or not 0 <= token_id < size:
            yield (
                f"{file}: eos_token_id {token_id!r} is not one of the model's "
                f"{size:,} tokens (vocab_size in config.json): correct it"
            )


def vocabulary_notes(folder: Path, shape: ModelShape) -> list[str]:
    """How tokenizer and embedding differ without harm."""
    known, size = num_token_ids(folder), shape.vocab_size
    if known is None or known == size:
        return []
    if known < size:
        return [
            f"{size - known:,} of the {size:,} embeddings have no token: the vocabulary is padded, "
            "and stays so"
        ]
    return [
        f"{known - size:,} of the tokenizer's {known:,} tokens have no embedding, and neither chat "
        f"template nor eos_token uses them: a prompt must not hold them. {resize_remedy(known)}"
    ]


def unreadable(folder: Path) -> Iterator[str]:
    """What is wrong with the tokenizer's files that cannot be read."""
    for name in TOKENIZER_FILES:
        try:
            read_json(folder / name)
        except ValueError as error:
            yield str(error)
