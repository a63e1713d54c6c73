"""No field of a model's config.json that changes logits is ignored: it is obeyed or refused.

Each field of the family's transformers class is changed by itself. Where transformers computes
other logits from the same weights, the policy gives the same log-probs or refuses the model and
names the field; where the weights do not fit the config any more, it refuses the model.
"""

import json

import pytest
import torch
import transformers
from config_fields import LEFT_OUT, changed_fields, older_form
from family_models import MODELS, save_family_model, transformers_model
from one_rank import logprobs_or_refusal, one_rank
from policy_cases import padded_logprobs, random_batch

from rlsys.model import keys
from rlsys.model.folder_check import check_model_folder
from rlsys.model.shape import read_model_shape
from rlsys.problems import ProblemsError

pytestmark = pytest.mark.system
FIRST = {MODELS[name][0]: name for name in reversed(MODELS)}.values()
"""One model of each family."""
LONG = {"deepseek_v2", "deepseek_v3"}
"""Those with the most fields."""


@pytest.fixture(scope="module")
def policy():
    with one_rank() as process:
        yield lambda folder: process.submit(logprobs_or_refusal, folder).result(timeout=120)


@torch.no_grad()
def theirs(folder, shapes):
    """transformers' log-probs [N, S].

    Args:
        shapes: of the weights, by transformers' names.

    Raises:
        Misfit: the weights are not those of the config.
    """
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        sketch = transformers.AutoModelForCausalLM.from_config(config)
    wanted = {name: tensor.shape for name, tensor in sketch.state_dict().items()}
    if not wanted.items() <= shapes.items():
        raise Misfit
    return padded_logprobs(transformers_model(folder), random_batch())


class Misfit(Exception):
    """The weights are not those of the config."""


def is_named(key, value, text):
    """Whether a refusal names the field or a key in it, and its value where that is short."""
    key = {"rope_scaling": "rope_"}.get(key, key)  # which transformers 5 calls rope_parameters
    if isinstance(value, dict) and any(inner in text for inner in value):
        return True
    is_short = isinstance(value, bool | int | float | str) and value != LEFT_OUT
    return key in text and (not is_short or repr(value) in text or json.dumps(value) in text)


def problem(policy, folder, key, value, shapes, plain):
    """How the changed field is ignored; "" if it is not."""
    refused = ""
    try:
        check_model_folder(folder, read_model_shape(folder), has_prompts=False)
    except ProblemsError:
        return ""  # the weights' files contradict the config
    except ValueError as error:
        refused = str(error)
    if is_named(key, value, refused):
        return ""
    try:
        expected = theirs(folder, shapes)
    except Misfit:
        return "" if refused else "the weights do not fit, and are taken"
    except Exception:  # transformers refuses the config, and so vLLM
        return ""
    if torch.allclose(expected, plain, rtol=0, atol=1e-6):
        return ""
    if refused:
        return f"is refused without its name: {refused}"
    found = policy(folder)
    if isinstance(found, str):
        return f"is refused late: {found}"
    # Some changes make sums round more than in the models whose log-probs are within 1e-5.
    if torch.allclose(found, expected, rtol=0, atol=3e-5, equal_nan=True):
        return ""
    return f"log-probs differ by {(found - expected).abs().max():.1e}"


class Walk:
    """A family's model, and copies of its folder with another config.json.

    Args:
        older: config.json is as in older files, where a switch has the settings that it switches.
    """

    def __init__(self, root, name, *, older):
        self.folder, self.config_class = root / "changed", getattr(transformers, MODELS[name][0])
        save_family_model(self.folder, name)
        self.values = json.loads((self.folder / "config.json").read_text())
        if older:
            self.values = older_form(self.values)
            self.write(self.values)
        model = transformers_model(self.folder)
        self.shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with torch.no_grad():
            self.plain = padded_logprobs(model, random_batch())

    def write(self, values):
        (self.folder / "config.json").write_text(json.dumps(values))

    def problem(self, policy, key, value, values):
        self.write(values)
        return problem(policy, self.folder, key, value, self.shapes, self.plain)


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {*FIRST} - LONG else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_no_field_that_changes_logits_is_ignored(policy, tmp_path, name, older):
    walk = Walk(tmp_path, name, older=older)
    torch.testing.assert_close(policy(walk.folder), walk.plain, rtol=0, atol=1e-5)
    ignored = []
    for key, value, values in changed_fields(walk.config_class, walk.values):
        found = walk.problem(policy, key, value, values)
        ignored += [f"{key} = {value!r}: {found}"] if found else []
    assert not ignored, "\n".join(ignored)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "gelu"), ("rms_norm_eps", 0.5), ("rope_theta", 50.0)]
)
def test_an_ignored_field_is_found(tmp_path, key, value):
    name = "qwen3"
    walk = Walk(tmp_path, name, older=True)
    plain = walk.plain  # a policy that computes what it did before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_INERT", {k: v for k, v in keys._INERT.items() if k != key})
        patch.setattr(keys, "_IMPLEMENTED", keys._IMPLEMENTED | {key})
        found = walk.problem(lambda folder: plain, key, value, walk.values | {key: value})
    assert "log-probs differ" in found
