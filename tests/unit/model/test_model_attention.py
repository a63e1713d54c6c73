"""Which attention computes a model's gradients right on GPUs."""

from types import SimpleNamespace

import pytest

from rlsys.model.attention import attends_by_torch, model_attention_problem


def shape(head_dim, values=None):
    latent = None if values is None else SimpleNamespace(v_head_dim=values)
    return SimpleNamespace(
        head_dim=head_dim, latent=latent, has_windows=False, model_type="a model"
    )


@pytest.mark.parametrize(
    ("model", "is_right"),
    [
        (shape(64), True),
        (shape(128), True),
        (shape(160), False),
        (shape(256), False),
        (shape(192, values=128), True),
        (shape(192, values=192), False),
        (shape(256, values=128), False),
    ],
)
def test_no_model_trains_with_wrong_gradients(model, is_right):
    def problem(backend, **options):
        return model_attention_problem(
            model, backend=backend, context_parallel_size=1, device="cuda", **options
        )

    assert attends_by_torch(model, "auto") is not is_right
    for backend in ("flash", "unfused"):
        assert not attends_by_torch(model, backend)
        assert problem(backend) is None
    assert problem("auto") is None
    assert (problem("fused") is None) is is_right
    assert (problem("auto", bridged=True) is None) is is_right
    assert problem("unfused", bridged=True) is None
