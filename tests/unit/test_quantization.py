"""How a checkpoint is quantized is read from whatever the tools have written, and what is not known is refused."""

from __future__ import annotations

from typing import Any

import pytest

from lazily import torch
from quantized_models import legacy_config, quantization_config, round_to_nearest
from shardprep.layout import Scheme, read_scheme
from shardprep.layout.quantization import spell
from shardprep.quantize.packing import dequantize, dequantized
from shardprep_runtime.errors import FormatError, InputError, LayoutError, UnsupportedError


def read(**how: Any) -> Scheme | None:
    return read_scheme({"quantization_config": how})


SCHEMES = [
    Scheme("gptq"),
    Scheme("gptq", 8, None, False, True, "gptq_v2", ("re:.*mlp.*", "lm_head")),
    Scheme("awq", group=64, symmetric=False, kept=("lm_head", "visual")),
    Scheme("compressed-tensors", kept=("lm_head",)),
    Scheme("compressed-tensors", 8, None, False, True, kept=("lm_head", "re:.*gate$")),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_the_tools_write_is_read(scheme: Scheme) -> None:
    found = read(**quantization_config(scheme))
    if scheme.method == "gptq":  # GPTQModel says all of them as patterns
        kept = tuple(f"re:{each.removeprefix('re:')}" for each in scheme.kept)
        scheme = Scheme(
            "gptq", scheme.bits, scheme.group, scheme.symmetric, scheme.act_order, scheme.format, kept
        )
    assert found == scheme


@pytest.mark.parametrize("scheme", [Scheme("gptq", group=32, act_order=True), Scheme("awq", symmetric=False)])
def test_what_old_tools_wrote_beside_it_is_read_and_spelled_as_engines_read_it(scheme: Scheme) -> None:
    legacy = legacy_config(scheme)
    assert read_scheme({"model_type": "llama"}, legacy) == scheme
    spelled = spell(scheme, legacy=legacy)
    assert read_scheme({"quantization_config": spelled}) == scheme
    assert spelled["quant_method"] == scheme.method
    assert {"bits", "group_size"} < spelled.keys()
    assert spell(scheme, legacy=legacy, head=True)["lm_head"] is True


def test_config_json_is_believed_before_the_file_beside_it() -> None:
    legacy = legacy_config(Scheme("gptq", group=32))
    assert read_scheme({"quantization_config": {"quant_method": "gptq", "group_size": 64}}, legacy) == Scheme(
        "gptq", group=64
    )


def test_a_file_of_that_name_that_says_nothing_of_bits_is_another_tools() -> None:
    assert read_scheme({}, {"some": "thing"}) is None


def test_a_model_that_sees_says_it_beside_its_language_model_or_within() -> None:
    how = quantization_config(Scheme("gptq"))
    assert read_scheme({"text_config": {"quantization_config": how}}) == Scheme("gptq")


def test_methods_that_are_not_ours_to_make_are_read_too() -> None:
    assert read(quant_method="fp8", weight_block_size=[128, 128]) == Scheme("fp8", 8, 128)
    assert read(quant_method="mxfp4", modules_to_not_convert=["lm_head"]) == Scheme(
        "mxfp4", 4, 32, kept=("lm_head",)
    )
    assert read(quant_method="modelopt", quant_algo="NVFP4") == Scheme("modelopt", 4, 16)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantized by bitsandbytes; known are awq, gptq, fp8"),
        ({}, "quantized by None"),
        ({"quant_method": "gptq", "bits": 3}, r"3 bits, which do not fill a word .* 2, 4 or 8"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits; expected 2, 4 or 8"),
        ({"quant_method": "gptq", "bits": "4"}, "bits is 4, expected an integer"),
        ({"quant_method": "gptq", "bits": True}, "bits is True, expected an integer"),
        ({"quant_method": "gptq", "group_size": 0}, "groups of 0 numbers; expected at least 1, or -1"),
        ({"quant_method": "gptq", "group_size": "128"}, "groups of 128 numbers"),
        ({"quant_method": "gptq", "sym": "yes"}, "sym is yes, expected true or false"),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            "packed as marlin, the order of one kernel",
        ),
        ({"quant_method": "gptq", "is_marlin_format": True}, "packed as marlin"),
        ({"quant_method": "gptq", "dynamic": {"+:.*down.*": {"bits": 8}}}, "with bits 8, the rest with None"),
        ({"quant_method": "awq", "bits": 8}, "8 bits; expected 4"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "packed as gemv_fast"),
        ({"quant_method": "awq", "modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "expected an object of objects"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}},
            },
            "2 schemes, such as 4 and 8 bits",
        ),
    ],
)
def test_what_is_not_known_is_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_scheme({"quantization_config": how or {"bits": 4}})


def test_a_quantization_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(LayoutError, match="quantization_config is gptq, expected an object"):
        read_scheme({"quantization_config": "gptq"})


# --------------------------------------------------------------------------------------- words as the tools pack them


def word(*numbers: int, bits: int = 4) -> int:
    """Numbers from the lowest bits up, as the int32 that they are."""
    found = sum(number << bits * i for i, number in enumerate(numbers))
    return found - 2**32 if found >= 2**31 else found


def ints(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_gptq_packs_along_the_input_and_stores_zero_points_less_one() -> None:
    numbers = [0, 1, 2, 3, 12, 13, 14, 15]
    fields = {
        "qweight": ints([[word(*numbers)] * 8]),
        "qzeros": ints([[word(0, 1, 2, 3, 4, 5, 6, 7)]]),
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found = dequantize(fields, Scheme("gptq", symmetric=False))
    assert found.shape == (8, 8)
    for out in range(8):
        assert found[out].tolist() == [(number - (out + 1)) * 0.5 for number in numbers]
    second = dequantize(fields, Scheme("gptq", symmetric=False, format="gptq_v2"))
    assert torch.equal(second, found + 0.5)


def test_a_zero_point_of_none_borrows_from_its_neighbour_and_is_given_back() -> None:
    """Less one, by words: what GPTQModel writes where a group has no negative weights."""
    zeros = ints([[word(0, 3, 0, 0, 8, 15, 1, 0)]])
    fields = {
        "qweight": ints([[0] * 8]),
        "qzeros": zeros - 0x11111111,
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    found = dequantize(fields, Scheme("gptq", group=8, symmetric=False))
    assert found[:, 0].tolist() == [0, -3, 0, 0, -8, -15, -1, 0]


def test_act_order_takes_each_inputs_scale_from_its_group() -> None:
    fields = {
        "qweight": ints([[word(*[9] * 8)] * 8]),
        "qzeros": ints([[word(*[7] * 8)]] * 2),
        "scales": torch.tensor([[1.0] * 8, [2.0] * 8], dtype=torch.float16),
        "g_idx": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.int32),
    }
    found = dequantize(fields, Scheme("gptq", group=4, act_order=True))
    assert found[0].tolist() == [2, 1, 1, 2, 2, 1, 2, 1]


def test_awq_interleaves_the_outputs_of_a_word() -> None:
    """AutoAWQ's order: the lowest bits hold output 0, then 2, 4, 6, 1, 3, 5, 7."""
    fields = {
        "qweight": ints([[word(0, 2, 4, 6, 1, 3, 5, 7)]]),
        "qzeros": ints([[word(0, 2, 4, 6, 1, 3, 5, 7)]]),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert not dequantize(fields, Scheme("awq", group=None, symmetric=False)).any()
    fields["qzeros"] = ints([[0]])
    found = dequantize(fields, Scheme("awq", group=None, symmetric=False))
    assert found[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_compressed_tensors_packs_along_the_input_with_an_offset() -> None:
    fields = {
        "weight_packed": ints([[word(0, 1, 2, 3, 8, 9, 14, 15)]]),
        "weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 8]),
    }
    scheme = Scheme("compressed-tensors", group=8)
    assert dequantize(fields, scheme)[0].tolist() == [-4, -3.5, -3, -2.5, 0, 0.5, 3, 3.5]
    fields["weight_zero_point"] = ints([[word(1, 0, 0, 0, 0, 0, 0, 0)]])
    found = dequantize(fields, Scheme("compressed-tensors", group=8, symmetric=False))
    assert found[0].tolist() == [-0.5, 0, 0.5, 1, 3.5, 4, 6.5, 7]
    fields["weight_shape"] = torch.tensor([1, 5])
    assert dequantize(fields, scheme).shape == (1, 5)  # the rest of the last word is filling


@pytest.mark.parametrize(("bits", "numbers"), [(2, 16), (4, 8), (8, 4)])
def test_a_word_holds_as_many_numbers_as_fit(bits: int, numbers: int) -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    fields = round_to_nearest(weight, Scheme("gptq", bits, None))
    assert fields["qweight"].shape == (32 // numbers, 16)
    assert fields["qzeros"].shape == (1, 16 // numbers)


def test_fields_that_do_not_belong_together_are_refused() -> None:
    fields = round_to_nearest(torch.ones(8, 32), Scheme("gptq", group=8))
    fields["g_idx"] = fields["g_idx"] + 4
    with pytest.raises(FormatError, match="32 inputs belong to groups 4 to 7, but there are scales of 4"):
        dequantize(fields, Scheme("gptq", group=8, act_order=True))
    fields["qweight"] = fields["qweight"].long()
    with pytest.raises(FormatError, match=r"packed numbers of dtype torch\.int64"):
        dequantize(fields, Scheme("gptq", group=8))
    with pytest.raises(UnsupportedError, match="expected qweight"):
        dequantize({"weight": torch.ones(1)}, Scheme("awq"))


def test_a_weight_that_does_not_divide_into_groups_is_not_rounded() -> None:
    with pytest.raises(LayoutError, match="8 x 40 does not divide into groups of 32 inputs and words of 8"):
        round_to_nearest(torch.ones(8, 40), Scheme("gptq", group=32))


def test_a_state_dict_has_its_weights_again_and_all_else_as_it_is() -> None:
    scheme = Scheme("awq", group=8, symmetric=False)
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    fields = round_to_nearest(weight, scheme)
    bias, norm = torch.ones(8), torch.ones(16)
    tensors = {f"a.q.{name}": tensor for name, tensor in fields.items()}
    found = dequantized({**tensors, "a.q.bias": bias, "a.norm.weight": norm, "b.scales": norm}, scheme)
    assert found.keys() == {"a.q.weight", "a.q.bias", "a.norm.weight", "b.scales"}
    assert torch.equal(found["a.q.weight"], dequantize(fields, scheme))
    assert found["b.scales"] is norm
