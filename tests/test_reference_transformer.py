"""The reference transformer: its formulas, written out by hand, and the weights its variants share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from gradscope import reference
from gradscope.reference import VARIANTS, Sublayer, Transformer, Variant

SMALL = {"depth": 3, "width": 16, "heads": 2, "vocabulary": 11, "context": 8}


def make(variant: str | Variant, seed: int = 0, **settings: object) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(variant, **{**SMALL, **settings}).double()  # type: ignore[arg-type]


def tokens(count: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(11, (count, length), generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor) -> Tensor:
    """LayerNorm at its start (weight 1, bias 0), from the definition."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


# y = x + F(x) and its relatives, one line per variant: f is the bare function, i the number
# of the block from 1, n the number of blocks.
FORMULAS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor], int, int], Tensor]] = {
    "no_skip": lambda x, f, i, n: f(x),
    "no_skip_pre_norm": lambda x, f, i, n: f(norm(x)),
    "no_skip_post_norm": lambda x, f, i, n: norm(f(x)),
    "skip": lambda x, f, i, n: x + f(x),
    "pre_norm": lambda x, f, i, n: x + f(norm(x)),
    "post_norm": lambda x, f, i, n: norm(x + f(x)),
    "peri_norm": lambda x, f, i, n: x + norm(f(norm(x))),
    "deepnorm": lambda x, f, i, n: norm((2 * n) ** 0.25 * x + f(x)),
    "rezero": lambda x, f, i, n: x,
    "layerscale": lambda x, f, i, n: x + 1e-4 * f(norm(x)),
    "depth_scaled": lambda x, f, i, n: x + f(norm(x)) / math.sqrt(2 * n),
    "layernorm_scaling": lambda x, f, i, n: x + f(norm(x) / math.sqrt(i)),
}


def test_every_variant_has_its_formula_here() -> None:
    assert set(FORMULAS) == set(VARIANTS)
    assert all(name == variant.name for name, variant in VARIANTS.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [True, False])
def test_each_variant_computes_its_formula(variant: str, causal: bool) -> None:
    model = make(variant, causal=causal)
    inputs = tokens()

    x = model.embed.tokens.weight[inputs] + model.embed.positions.weight[: inputs.shape[1]]
    for number, block in enumerate(model.blocks, 1):
        for sublayer in (block.attention, block.feed_forward):
            x = FORMULAS[variant](x, sublayer.branch.function, number, len(model.blocks))
    if VARIANTS[variant].norm in ("pre", "peri"):
        x = norm(x)
    expected = x @ model.head.weight.T + model.head.bias

    torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_softmax_of_the_scaled_scores(causal: bool) -> None:
    attention = make("pre_norm", causal=causal).blocks[0].attention.branch.function
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mixed = []
    for head in range(2):
        part = slice(8 * head, 8 * head + 8)
        q, k, v = (linear(x)[..., part] for linear in (attention.query, attention.key, attention.value))
        scores = q @ k.transpose(1, 2) / math.sqrt(8)
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        mixed.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(
        attention(x), attention.output(torch.cat(mixed, -1)), rtol=1e-12, atol=1e-12
    )


def test_a_causal_model_does_not_see_the_future_and_a_bidirectional_one_does() -> None:
    inputs = tokens()
    other = inputs.clone()
    other[:, -1] = (other[:, -1] + 1) % 11
    for causal in (True, False):
        model = make("pre_norm", causal=causal)
        same = torch.allclose(model(inputs)[:, :-1], model(other)[:, :-1], rtol=0, atol=1e-12)
        assert same is causal


def test_a_zero_branch_is_exactly_the_identity() -> None:
    model = make("rezero")
    x = torch.randn(2, 8, 16, dtype=torch.float64)
    for block in model.blocks:
        assert torch.equal(block(x), x)
    inputs = tokens()
    assert torch.equal(model(inputs), model.head(model.embed(inputs)))
    for block in model.blocks:  # and it can learn: α gets a gradient, although the branch does not
        block.attention.branch.scale.scale.grad = None
    reference.next_token_loss(model, (inputs, inputs)).backward()
    assert all(block.attention.branch.scale.scale.grad != 0 for block in model.blocks)


def test_what_a_variant_does_not_have_is_not_in_the_model() -> None:
    def modules(variant: str) -> dict[str, str]:
        sublayer = make(variant).blocks[0].attention
        steps = {name: type(module).__name__ for name, module in sublayer.branch.named_children()}
        return {**steps, "after": type(sublayer.norm).__name__}

    assert modules("no_skip") == modules("skip") == {"function": "Attention", "after": "NoneType"}
    assert modules("pre_norm") == {"norm": "LayerNorm", "function": "Attention", "after": "NoneType"}
    assert modules("post_norm") == {"function": "Attention", "after": "LayerNorm"}
    assert list(modules("peri_norm")) == ["norm", "function", "norm_out", "after"]
    assert list(modules("rezero")) == ["function", "scale", "after"]


def test_the_final_norm_is_there_exactly_where_the_stream_is_not_normalised() -> None:
    for name, variant in VARIANTS.items():
        has = isinstance(make(name).final_norm, nn.LayerNorm)
        assert has is (variant.norm in ("pre", "peri")), name
    assert isinstance(make("post_norm", final_norm=True).final_norm, nn.LayerNorm)
    assert isinstance(make("pre_norm", final_norm=False).final_norm, nn.Identity)


@pytest.mark.parametrize("initialization", reference.INITIALIZATIONS)
def test_all_variants_draw_the_same_weights_under_one_seed(initialization: str) -> None:
    plain = dict(make("no_skip", seed=7, initialization=initialization).named_parameters())
    beta = (8 * SMALL["depth"]) ** -0.25
    for variant in VARIANTS:
        other = dict(make(variant, seed=7, initialization=initialization).named_parameters())
        assert plain.keys() <= other.keys()
        for name, weight in plain.items():
            scaled = name.endswith(("value.weight", "output.weight", "expand.weight", "contract.weight"))
            if variant == "deepnorm" and scaled:
                torch.testing.assert_close(other[name], beta * weight, rtol=1e-6, atol=0)
            else:
                assert torch.equal(other[name], weight), (variant, name)
        # What only this variant has starts at a constant: nothing else was drawn.
        for name in other.keys() - plain.keys():
            assert other[name].unique().numel() == 1, (variant, name)


def test_another_seed_draws_other_weights() -> None:
    assert not torch.equal(make("skip", seed=0).head.weight, make("skip", seed=1).head.weight)


@pytest.mark.parametrize(
    ("initialization", "std", "bound"),
    [
        ("torch", lambda i, o: 1 / math.sqrt(3 * i), lambda i, o: 1 / math.sqrt(i)),
        ("xavier", lambda i, o: math.sqrt(2 / (i + o)), lambda i, o: math.sqrt(6 / (i + o))),
        ("normal", lambda i, o: 0.02, None),
        ("he", lambda i, o: math.sqrt(2 / i), None),
    ],
)
def test_each_initialisation_has_its_distribution(
    initialization: str,
    std: Callable[[int, int], float],
    bound: Callable[[int, int], float] | None,
) -> None:
    model = make("no_skip", initialization=initialization, width=128, depth=1, vocabulary=300)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7
    for linear in linears:
        i, o = linear.in_features, linear.out_features
        assert linear.weight.std().item() == pytest.approx(std(i, o), rel=0.03)
        assert abs(linear.weight.mean().item()) < 4 * std(i, o) / math.sqrt(i * o)
        if bound is not None:
            assert linear.weight.abs().max().item() <= bound(i, o)
        assert (linear.bias == 0).all().item() is (initialization != "torch")
    assert model.embed.tokens.weight.std().item() == pytest.approx(1, rel=0.03)


def test_deepnorm_constants() -> None:
    assert reference.deepnorm_constants(12) == pytest.approx((2.2134, 0.3195), abs=1e-4)
    assert reference.deepnorm_constants(100) == pytest.approx((3.7606, 0.1880), abs=1e-4)
    with pytest.raises(ValueError, match="one block or more"):
        reference.deepnorm_constants(0)


def test_branches_name_the_branches_in_forward_order() -> None:
    model = make("peri_norm")
    ran: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Sublayer):
            module.branch.register_forward_hook(lambda *_, name=name: ran.append(f"{name}.branch"))
    model(tokens())
    assert model.branches == tuple(ran)
    assert len(ran) == 6
    assert ran[1] == "blocks.0.feed_forward.branch"


def test_the_loss_is_the_mean_cross_entropy_over_all_tokens() -> None:
    model, inputs, targets = make("pre_norm"), tokens(), tokens(seed=5)
    logits = model(inputs)
    assert logits.shape == (2, 8, 11)
    expected = sum(cross_entropy(logits[b, t], targets[b, t]).item() for b in range(2) for t in range(8))
    assert reference.next_token_loss(model, (inputs, targets)).item() == pytest.approx(expected / 16)


def test_a_variant_of_ones_own_and_the_norm_of_torch() -> None:
    own = Variant(
        name="own",
        label="own",
        description="x + λF(LN x)",
        skip="sublayer",
        norm="pre",
        branch_scale="depth",
    )
    assert torch.equal(make(own)(tokens()), make("depth_scaled")(tokens()))
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(norm(x), layer_norm(x, (16,)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "prenorm"}, "variant='prenorm' is none of no_skip"),
        ({"initialization": "lecun"}, "initialization='lecun' is none of torch"),
        ({"activation": "swish"}, "activation='swish' is none of gelu"),
        ({"depth": 0}, "depth=0"),
        ({"width": 10, "heads": 4}, "width=10 cannot be divided among heads=4"),
    ],
)
def test_a_wrong_setting_says_what_is_right(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Transformer(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"skip": "block", "norm": "pre"}, "skip='block' is none of none, sublayer"),
        ({"skip": "none", "norm": "post", "deepnorm": True}, "deepnorm is LN"),
        ({"skip": "none", "norm": "none", "branch_scale": "rezero"}, "there is no skip"),
        ({"skip": "sublayer", "norm": "post", "layernorm_scaling": True}, "has none there"),
    ],
)
def test_a_variant_that_makes_no_sense_is_refused(choices: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Variant(name="odd", label="odd", description="", **choices)  # type: ignore[arg-type]


def test_a_sequence_that_is_too_long_says_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"Transformer\(\.\.\., context=9\)"):
        make("pre_norm")(tokens(length=9))


def increments(variant: str, depth: int) -> list[float]:
    """Mean of ln(g_l / g_(l+1)) over the blocks, g the gradient's norm at block outputs, per seed."""
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = Transformer(variant, depth=depth).double()
        batch = torch.randint(256, (2, 33))
        x = model.embed(batch[:, :-1])
        stream = []
        for block in model.blocks:
            x = block(x)
            stream.append(x)
        logits = model.head(model.final_norm(x))
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        first, *_, last = torch.autograd.grad(loss, stream)
        found.append(math.log(first.norm() / last.norm()) / (depth - 1))
    return found


@pytest.mark.parametrize("depth", [6, 24])
def test_the_gradient_vanishes_without_skips_and_norms_and_not_with_pre_norm(depth: int) -> None:
    assert max(increments("no_skip", depth)) < -2
    assert max(abs(r) for r in increments("pre_norm", depth)) < 0.1
