"""Rules and the interface of providers."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

import qwix
from qwix._src import interception, qconfig

Rule = qwix.QuantizationRule


def test_rule_fields_and_defaults():
    rule = Rule()
    assert dataclasses.asdict(rule) == {
        "module_path": ".*",
        "op_names": (),
        "weight_qtype": None,
        "act_qtype": None,
        "tile_size": None,
        "act_static_scale": None,
        "weight_calibration_method": "absmax",
        "act_calibration_method": None,
        "act_batch_axes": (0,),
    }
    with pytest.raises(TypeError):
        Rule(".*")
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.tile_size = 3


@pytest.mark.parametrize(
    "rule,message",
    [
        (Rule(act_static_scale=True), "act_static_scale needs an act_qtype"),
        (Rule(module_path="layers[0"), "module_path 'layers\\[0' is no regular expression"),
    ],
)
def test_rules_that_contradict_themselves(rule, message):
    with pytest.raises(ValueError, match=message):
        qconfig.QuantizationProvider([rule])


@pytest.mark.parametrize(
    "rules,path,op,expected",
    [
        ([Rule()], "", "dot_general", 0),
        ([Rule()], "a/b", "einsum", 0),
        ([Rule(module_path="a")], "a/b", "einsum", None),  # the whole path has to match
        ([Rule(module_path="b")], "a/b", "einsum", None),
        ([Rule(module_path="a/.*"), Rule()], "a/b", "einsum", 0),
        ([Rule(module_path="a/.*"), Rule()], "c", "einsum", 1),
        ([Rule(op_names=("einsum",)), Rule(module_path="c")], "c", "dot_general", 1),
        ([Rule(op_names=("einsum",))], "c", "dot_general", None),
        ([Rule(op_names={"dot"})], "c", "dot_general", None),
        ([Rule(op_names="dot")], "c", "dot_general", None),  # one name is no pattern
        ([Rule(op_names="dot_general")], "c", "dot_general", 0),
        ([Rule(module_path=r"layers/\d+/(q|k)")], "layers/12/q", "einsum", 0),
        ([], "", "einsum", None),
    ],
)
def test_first_match_wins(rules, path, op, expected):
    assert qconfig.QuantizationProvider(rules)._find_rule(path, op) == expected


class Child(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.eye(3))

    def __call__(self, x):
        return x @ self.w[...] @ self.w[...] + jnp.einsum("ij->ij", x)


class Parent(nnx.Module):
    def __init__(self):
        self.first, self.second = Child(), Child()

    def __call__(self, x):
        return self.first(self.second(self.first(x)))


def test_op_ids_count_within_a_module_and_a_call():
    seen = []

    class Provider(qconfig.QuantizationProvider):
        def dot_general(self, *args, **kwargs):
            rule, op_id = self._get_current_rule_and_op_id("dot_general")
            again = self._get_current_rule_and_op_id("dot_general", repeated_call=True)
            only = self._get_current_rule_and_op_id("dot_general", only_rule=True)
            assert again == (rule, op_id) and only == (rule, None)
            seen.append((self._relative_module_path(), op_id))
            import jax

            return jax.lax.dot_general(*args, **kwargs)

        def get_intercept_map(self):
            return super().get_intercept_map() | {"jax.lax.dot_general": self.dot_general}

    provider = Provider([Rule(module_path="first"), Rule(module_path="second"), Rule(module_path="third")])
    model = qwix.quantize_model(Parent(), provider, jnp.ones((2, 3)))
    expected = [
        ("first", "dot_general0"),
        ("first", "dot_general1"),
        ("second", "dot_general0"),
        ("second", "dot_general1"),
        ("first", "dot_general2"),
        ("first", "dot_general3"),
    ]
    assert seen == expected
    seen.clear()
    model(jnp.ones((2, 3)))
    assert seen == expected
    assert [r.module_path for r in provider.get_unused_rules()] == ["third"]


def test_inputs_and_outputs_pass_the_provider():
    class Provider(qconfig.QuantizationProvider):
        def process_model_inputs(self, model, args, kwargs):
            assert isinstance(model, Child)
            return model, [2 * x for x in args], kwargs

        def process_model_output(self, method_name, output):
            assert method_name == "__call__"
            return {"y": output}

    model = qwix.quantize_model(Child(), Provider([]), jnp.ones((2, 3)))
    assert model(jnp.ones((2, 3)))["y"].tolist() == Child()(2 * jnp.ones((2, 3))).tolist()


def test_several_interceptors_outermost_first():
    order = []

    class Provider(qconfig.QuantizationProvider):
        def get_interceptors(self):
            def factory(name):
                def handler(*args, **kwargs):
                    order.append(name)
                    return jnp.sin(*args, **kwargs)

                return lambda: interception.Interceptor({"jax.numpy.sin": handler}, id=name)

            return [factory("outer"), factory("inner")]

    class Sine(nnx.Module):
        def __call__(self, x):
            return jnp.sin(x)

    model = qwix.quantize_model(Sine(), Provider([]), jnp.ones(2))
    order.clear()
    model(jnp.ones(2))
    assert order == ["inner", "outer"]


def test_disable_jit():
    import jax

    class Jitted(nnx.Module):
        def __call__(self, x):
            return jax.jit(lambda x: jnp.full((), isinstance(x, jax.core.Tracer)))(x)

    x = jnp.ones(2)
    plain = qwix.quantize_model(Jitted(), qconfig.QuantizationProvider([]), skip_nnx_init=True)
    eager = qwix.quantize_model(Jitted(), qconfig.QuantizationProvider([], disable_jit=True), skip_nnx_init=True)
    assert plain(x) and not eager(x)
