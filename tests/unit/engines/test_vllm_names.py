from rlsys.engines.vllm.names import not_loaded

EXPERTS = {f"layers.{n}.experts.routed_experts.w{k}_weight" for n in range(2) for k in (13, 2)}
DENSE = {"norm.weight", "layers.0.qkv_proj.weight"}


def test_what_the_loader_never_saw_is_named_in_order():
    assert not_loaded(DENSE | EXPERTS, set()) == sorted(DENSE | EXPERTS)
    assert not_loaded(DENSE | EXPERTS, DENSE | EXPERTS) == []
    assert not_loaded(DENSE, {"norm.weight"}) == ["layers.0.qkv_proj.weight"]


def test_experts_count_under_the_names_that_vllm_0_26_gives_them():
    without_prefix = {name.replace("routed_experts.", "") for name in EXPERTS}
    assert not_loaded(DENSE | EXPERTS, DENSE | without_prefix) == []
    (missing,) = without_prefix - set(sorted(without_prefix)[1:])
    expected = missing.replace("experts.", "experts.routed_experts.")
    assert not_loaded(DENSE | EXPERTS, DENSE | without_prefix - {missing}) == [expected]
