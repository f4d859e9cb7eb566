"""Einsum strings against np.einsum's own reading of them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwix._src.core import einsum_info, qarray
from qwix._src.core.einsum_info import EinsumInfo
from tests.core import oracle


@pytest.mark.parametrize(
    ("einsum_str", "batch", "contract", "dimension_numbers", "output_perm"),
    [
        ("ab,bc->ac", [], ["b"], (((1,), (0,)), ((), ())), None),
        ("ab,bc", [], ["b"], (((1,), (0,)), ((), ())), None),
        (" a b , b c -> c a ", [], ["b"], (((1,), (0,)), ((), ())), (1, 0)),
        ("abc,bcd->acd", ["c"], ["b"], (((1,), (0,)), ((2,), (1,))), (1, 0, 2)),
        ("bqhd,bkhd->bhqk", ["b", "h"], ["d"], (((3,), (3,)), ((0, 2), (0, 2))), None),
        ("xbac,xcab->xcb", ["b", "c", "x"], ["a"], (((2,), (2,)), ((1, 3, 0), (3, 1, 0))), (2, 1, 0)),
        ("ab,ab->", [], ["a", "b"], (((0, 1), (0, 1)), ((), ())), None),
        ("a,b->ba", [], [], (((), ()), ((), ())), (1, 0)),
    ],
)
def test_parse(einsum_str, batch, contract, dimension_numbers, output_perm):
    info = EinsumInfo.parse(einsum_str)
    assert info.batch_chars == batch
    assert info.contract_chars == contract
    assert info.dimension_numbers == dimension_numbers
    assert info.output_perm == output_perm


@st.composite
def binary_einsums(draw):
    sizes = dict(zip("abcdefg", draw(st.permutations([1, 2, 3, 2, 3, 4, 2])), strict=True))
    lhs = draw(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4))
    rhs = draw(st.lists(st.sampled_from("abcdefg"), unique=True, max_size=4))
    optional = [c for c in lhs if c in rhs]
    free = [c for c in lhs + rhs if c not in optional]
    out = draw(st.permutations(free + draw(st.lists(st.sampled_from(optional or ["_"]), unique=True))))
    out = [c for c in out if c != "_"]
    return "".join(lhs), "".join(rhs), "".join(out), sizes


@settings(deadline=None, max_examples=100)
@given(case=binary_einsums())
def test_is_a_dot_general_and_a_transpose(case):
    lhs, rhs, out, sizes = case
    info = EinsumInfo.parse(f"{lhs},{rhs}->{out}")
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=[sizes[c] for c in labels]) for labels in (lhs, rhs))
    found = oracle.dot_general(x, y, info.dimension_numbers)
    if info.output_perm is not None:
        found = found.transpose(info.output_perm)
    np.testing.assert_allclose(found, np.einsum(f"{lhs},{rhs}->{out}", x, y))


@pytest.mark.parametrize(
    ("einsum_str", "ndims", "error"),
    [
        ("ab->a", None, NotImplementedError),
        ("ab,bc,cd->ad", None, NotImplementedError),
        ("...a,a->...", None, NotImplementedError),
        ("aa,ab->b", None, NotImplementedError),
        ("ab,bb->a", None, NotImplementedError),
        ("ab,bc->ad", None, ValueError),
        ("ab,bc->aca", None, ValueError),
        ("ab,bc->ac", (3, 2), ValueError),
        ("...abc,b->...", (2, 1), ValueError),
        ("...a,a->a", (3, 1), ValueError),
    ],
)
def test_parse_errors(einsum_str, ndims, error):
    with pytest.raises(error, match="insum"):
        EinsumInfo.parse(einsum_str, ndims)


def test_a_lone_sum_has_no_permutation():
    with pytest.raises(NotImplementedError, match='"ab,c->c"'):
        EinsumInfo("ab", "c", "c").output_perm


@pytest.mark.parametrize(
    ("einsum_str", "ndims", "expected"),
    [
        ("...ab,bc->...ac", (4, 2), (("deab", "bc"), "deac")),
        ("...a,...a->...", (3, 2), (("bca", "ca"), "bc")),
        ("a...,...a", (3, 3), (("abc", "bca"), "bc")),
        ("...b,b->...", (1, 1), (("b", "b"), "")),
        ("ba", (2,), (("ba",), "ab")),
        ("...,...", (0, 0), (("", ""), "")),
        ("ii,ij", (2, 2), (("ii", "ij"), "j")),
    ],
)
def test_parse_subscripts(einsum_str, ndims, expected):
    assert einsum_info.parse_subscripts(einsum_str, ndims) == expected


def test_wrong_number_of_operands():
    with pytest.raises(ValueError, match="2 operands, 3 were given"):
        einsum_info.parse_subscripts("ab,bc", (2, 2, 2))


@pytest.mark.parametrize("optimize", ["auto", "greedy", "optimal", True, False, ((0, 2), (0, 1))])
def test_contraction_steps(optimize):
    """Whatever the order, the steps add up to the einsum."""
    inputs, out = ("ab", "bcd", "dc", "ae"), "ed"
    shapes = ((2, 3), (3, 4, 5), (5, 4), (2, 6))
    if isinstance(optimize, tuple):
        optimize = (*optimize, (0, 1))
    steps = einsum_info.contraction_steps(inputs, out, shapes, optimize)
    assert len(steps) == 3
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in shapes]
    operands = list(arrays)
    for step in steps:
        info = step.info
        operands.append(np.einsum(f"{info.lhs},{info.rhs}->{info.out}", operands[step.lhs], operands[step.rhs]))
    assert all(step.info.output_perm is None for step in steps[:-1])
    np.testing.assert_allclose(operands[-1], np.einsum(",".join(inputs) + "->" + out, *arrays))


def test_the_path_follows_the_sizes():
    small_last = einsum_info.contraction_steps(("ab", "bc", "c"), "a", ((8, 8), (8, 8), (8,)))
    small_first = einsum_info.contraction_steps(("a", "ab", "bc"), "c", ((8,), (8, 8), (8, 8)))
    assert (small_last[0].lhs, small_last[0].rhs) == (1, 2)
    assert (small_first[0].lhs, small_first[0].rhs) == (0, 1)


def test_symbolic_sizes():
    assert einsum_info.sanitize_shape(("b", 2, 3)) == (1, 2, 3)
    steps = einsum_info.contraction_steps(("ab", "bc", "cd"), "ad", (("n", 2), (2, 3), (3, 4)))
    assert steps[-1].info.out == "ad"


def test_broadcast_operands():
    q = oracle.quantized(np.random.default_rng(0), (1, 4), "int8", tiled_axes={1: 2})
    x, y, unchanged = jnp.ones((2, 1)), q, jnp.ones((3,))
    found = einsum_info.broadcast_operands([x, y, unchanged], ["ab", "ab", "c"])
    assert [a.shape for a in found] == [(2, 4), (2, 4), (3,)]
    assert found[1].scale.shape == (1, 2)
    assert found[2] is unchanged
    np.testing.assert_array_equal(qarray.dequantize(found[1]), np.tile(qarray.dequantize(q), (2, 1)))


def test_broadcast_mismatch():
    with pytest.raises(ValueError, match='Label "a" has sizes 2 and 3'):
        einsum_info.broadcast_operands([jnp.ones(2), jnp.ones(3)], ["a", "a"])
