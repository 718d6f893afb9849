"""Stacking of network calls: what is stacked, that no bit of a row depends on its neighbours, and what ends leave."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from greenlet import greenlet
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_infer.errors import ModelError
from batch_infer.models import AnyPipeline
from batch_infer.records import PromptRequest
from batch_infer.stacking import (
    ENCODE_BATCH,
    CallStacker,
    EncoderCache,
    RecordedCall,
    copy_pipeline,
    evaluator,
    find_networks,
)
from batch_infer.stacking.checking import depends_on_shape
from batch_infer.stacking.networks import Network
from batch_infer.stacking.plan import TextPadding
from batch_infer.stacking.recording import compare_calls
from batch_infer.stacking.signature import Signatures
from batch_infer.stacking.stack import Stack
from batch_infer.stacking.stacker import MAX_WAITING_TICKS
from batch_infer.stacking.trees import BatchAxes, UnstackableError, clone_tensors, count_bytes, find_axes
from tests import painting
from tests.painting import load_painting, paint_row
from tests.rendering import CPU
from tests.stackers import assert_restored, image_of, open_stacker, run, run_to_the_end, start

STACKED = (
    painting.PaintingPipeline,
    painting.SequentialPipeline,
    painting.AutocastPipeline,
    painting.LayeredPipeline,
    painting.ModifyingPipeline,
    painting.MaskedPipeline,
    painting.ListPipeline,
    painting.NormalizingPipeline,
    painting.NestedPipeline,
    painting.BatchNormPipeline,
)
PARTLY_STACKED = (painting.PartlyStackedPipeline,)
ALONE = (painting.VaryingPipeline, painting.ChunkingPipeline, painting.RoutingPipeline, painting.StoringPipeline)


class Models(dict[Any, AnyPipeline]):
    """Loads the model of a pipeline type when it is first used."""

    def __missing__(self, pipeline_type: Any) -> AnyPipeline:
        self[pipeline_type] = load_painting(pipeline_type)
        return self[pipeline_type]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


@pytest.fixture
def painter(models: Models) -> AnyPipeline:
    return models[painting.PaintingPipeline]


# Trees, axes and signatures


def test_the_batch_axis_is_the_one_that_is_twice_as_long() -> None:
    def tree(count: int) -> dict[str, Any]:
        return {
            "first": torch.zeros(count, 3),
            "second": [torch.zeros(4, count, 3), (torch.zeros(3),)],
            "texts": [torch.zeros(5, 2)] * count,
            "shared": torch.zeros(6, 3),
            "grid": torch.zeros(count, count),
            "flag": True,
        }

    assert dict(find_axes(tree(1), tree(2))) == {("first",): 0, ("second", 0): 1, ("texts",): 0}


def test_elements_are_counted_by_the_first_argument_that_is_given() -> None:
    axes = BatchAxes({("mask",): 1, ("states", 0): 0, ("texts",): 0})
    assert axes.count_elements({"mask": torch.zeros(9, 3)}) == 3
    assert axes.count_elements({"mask": None, "states": [torch.zeros(4, 9)]}) == 4
    assert axes.count_elements({"texts": [None] * 5}) == 5
    with pytest.raises(UnstackableError):
        axes.count_elements({"other": torch.zeros(3)})


def test_a_network_that_is_called_for_each_prompt_has_no_axes() -> None:
    network = find_networks(painting.PaintingPipeline.build())[0]

    def call(count: int, axis: int = 0) -> RecordedCall:
        shape = [3, 3]
        shape[axis] = count
        return RecordedCall(network, {"x": torch.zeros(shape)}, torch.zeros(count))

    assert compare_calls([call(1)], [call(1), call(1)]) == {}
    assert compare_calls([call(1)], [call(2)]) == {network.name: BatchAxes({("x",): 0}, {(): 0})}
    assert compare_calls([call(1), call(1, 1)], [call(2), call(2, 1)]) == {}, "the axes of two calls differ"


AXES = BatchAxes({("x",): 0, ("nested", "y"): 1, ("texts",): 0})


def arguments(count: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "x": torch.rand(count, 3),
        "nested": {"y": torch.rand(2, count)},
        "texts": [torch.rand(4, 2) for _ in range(count)],
        "positions": torch.arange(6.0),
        "timestep": torch.rand(1),
        "scale": 2.0,
        "generator": torch.Generator(),
        **changes,
    }


def test_calls_that_differ_in_batch_elements_have_equal_signatures() -> None:
    signatures = Signatures()
    assert signatures.of(arguments(1), AXES) == signatures.of(arguments(3), AXES)
    one, other = arguments(timestep=3), arguments(timestep=4.5)
    assert signatures.of(one, AXES) == signatures.of(other, AXES)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.rand(1, 4)},
        {"x": torch.rand(1, 3, dtype=torch.float64)},
        {"texts": [torch.rand(5, 2)]},
        {"positions": torch.arange(6.0) + 1},
        {"positions": torch.arange(6.0).reshape(2, 3)},
        {"positions": None},
        {"timestep": torch.rand(1, dtype=torch.float64)},
        {"scale": 3.0},
        {"another": None},
        {"nested": {"y": torch.rand(2, 1), "z": 0}},
    ],
)
def test_calls_that_differ_otherwise_have_different_signatures(changes: dict[str, Any]) -> None:
    signatures = Signatures()
    assert signatures.of(arguments(), AXES) != signatures.of(arguments(**changes), AXES)


def test_texts_of_a_list_may_differ_in_length_with_stand_ins() -> None:
    signatures, longer = Signatures(), arguments(texts=[torch.rand(9, 2)])
    assert signatures.of(arguments(), AXES, free_lengths=True) == signatures.of(longer, AXES, free_lengths=True)


def test_a_call_with_an_object_of_unknown_type_is_not_stacked() -> None:
    with pytest.raises(UnstackableError):
        Signatures().of(arguments(cache=object()), AXES)
    with pytest.raises(UnstackableError):
        Signatures().content({"cache": object()})


def test_a_shared_tensor_is_read_again_after_a_change_and_not_kept() -> None:
    signatures, shared = Signatures(), torch.arange(6.0)
    before = signatures.of(arguments(positions=shared), AXES)
    shared += 1
    assert signatures.of(arguments(positions=shared), AXES) != before
    reference = weakref.ref(shared)
    del shared
    assert reference() is None


@given(first=st.lists(st.integers(0, 2), max_size=4), second=st.lists(st.integers(0, 2), max_size=4))
def test_contents_are_equal_for_equal_texts(first: list[int], second: list[int]) -> None:
    signatures = Signatures()
    keys = [signatures.content({"input_ids": torch.tensor([ids])}) for ids in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)


# Stacks

LEAVES = st.one_of(
    st.tuples(st.just("batch"), st.integers(0, 2), st.sampled_from([torch.float32, torch.bfloat16, torch.int64])),
    st.tuples(st.just("shared"), st.integers(2, 3)),
    st.tuples(st.just("texts"), st.integers(1, 3)),
    st.tuples(st.just("constant"), st.sampled_from([None, True, "text", 7, 2.5])),
)
TREES = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        LEAVES,
        lambda parts: st.one_of(
            st.lists(parts, max_size=3).map(lambda items: ("list", items)),
            st.lists(parts, max_size=3).map(lambda items: ("tuple", items)),
            st.dictionaries(st.sampled_from("xyz"), parts, max_size=3).map(lambda items: ("dict", items)),
        ),
        max_leaves=6,
    ),
    min_size=1,
)


def grow(spec: Any, count: int, path: tuple[Any, ...], axes: dict[tuple[Any, ...], int]) -> Any:
    """Return a value for `count` batch elements, and note the batch axis of each tensor and list inside."""
    kind, value = spec[:2]
    if kind == "batch":
        axes[path] = value
        shape = [2, 3, 4]
        shape[value] = count
        return (100 * torch.rand(shape)).to(spec[2])
    if kind == "shared":
        return torch.full((value, 5), float(value))
    if kind == "texts":
        axes[path] = 0
        return [torch.rand(value, 2) for _ in range(count)]
    if kind == "constant":
        return value
    if kind == "dict":
        return {key: grow(part, count, (*path, key), axes) for key, part in value.items()}
    parts = [grow(part, count, (*path, index), axes) for index, part in enumerate(value)]
    return parts if kind == "list" else tuple(parts)


def are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(are_equal, one, other))
    return bool(one == other)


@settings(deadline=None)
@given(spec=TREES, counts=st.lists(st.integers(1, 3), min_size=1, max_size=4), spare=st.integers(0, 3))
def test_the_parts_of_a_stack_are_the_calls(spec: dict[str, Any], counts: list[int], spare: int) -> None:
    axes: dict[tuple[Any, ...], int] = {}
    calls = [{name: grow(part, count, (name,), axes) for name, part in spec.items()} for count in counts]
    size = sum(counts) + spare
    signatures = Signatures()
    assert len({signatures.of(call, BatchAxes(axes)) for call in calls}) == 1
    stack = Stack(BatchAxes(axes, axes), counts, size, CPU)
    stacked = stack.stack(calls)
    if axes:
        assert BatchAxes(axes).count_elements(stacked) == size
    for index, call in enumerate(calls):
        assert are_equal(stack.split(stacked, index), call)
    assert are_equal(clone_tensors(stacked), stacked)
    assert count_bytes(clone_tensors(stacked)) == count_bytes(stacked)


def test_spare_elements_are_copies_of_the_last_one() -> None:
    stack = Stack(AXES, [1, 2], 5, CPU)
    one, two = arguments(1), arguments(2)
    stacked = stack.stack([one, two])
    assert torch.equal(stacked["x"], torch.cat([one["x"], two["x"], two["x"][1:], two["x"][1:]]))
    assert stacked["texts"][3:] == [two["texts"][1]] * 2


def test_numbers_of_rows_become_one_number_per_element() -> None:
    stack = Stack(AXES, [1, 2], 4, CPU)
    calls = [arguments(1, timestep=5, t=torch.tensor(7)), arguments(2, timestep=2.5, t=torch.tensor([8]))]
    stacked = stack.stack(calls)
    assert stacked["timestep"].tolist() == [5, 2.5, 2.5, 2.5]
    assert stacked["t"].tolist() == [7, 8, 8, 8]


def test_texts_are_padded_with_zeros_that_are_masked() -> None:
    padding = TextPadding("text", {"text": 1}, "mask", 4)
    padded = padding.pad({"text": torch.ones(2, 3, 5), "other": 1})
    assert padded["text"].shape == (2, 4, 5)
    assert padded["text"][:, 3].eq(0).all()
    assert padded["mask"].tolist() == [[True, True, True, False]] * 2
    longer = torch.ones(2, 6, 5)
    assert torch.equal(padding.pad({"text": longer})["text"], longer)
    given_mask = padding.pad({"text": torch.ones(2, 3, 5), "mask": torch.zeros(2, 3, dtype=torch.bool)})
    assert not given_mask["mask"].any()


@pytest.mark.parametrize(
    ("counts", "is_dependent"), [((3, 6), False), ((3, 50), True), ((50, 0), True), ((100, 200), False)]
)
def test_a_layer_is_tried_with_multiples_of_all_numbers_of_rows(counts: tuple[int, ...], is_dependent: bool) -> None:
    """Neighbours may route no text to an expert. This one rounds differently for 100 rows or more."""
    expert = painting.Expert(painting.WIDTH, painting.WIDTH)
    network = Network("expert", torch.nn.Sequential(expert), "denoise", CPU)
    shapes = {torch.Size((count, painting.WIDTH)) for count in counts}
    assert depends_on_shape(network, {"input": torch.zeros(3, painting.WIDTH)}, {expert: shapes}) == is_dependent


def test_a_layer_that_is_not_tried_may_depend_on_its_shape() -> None:
    size = torch.Size((3, painting.WIDTH))
    layers: Any = [torch.nn.Linear(painting.WIDTH, painting.WIDTH), torch.nn.Conv1d(3, 3, 1)]
    network = Network("layers", torch.nn.Sequential(layers[1]), "denoise", CPU)
    for layer in layers:
        assert depends_on_shape(network, {"input": torch.zeros(size)}, {layer: {size}})


# The cache of encoder results


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=40))
def test_the_cache_is_bounded_and_forgets_the_oldest(entries: list[tuple[int, int]]) -> None:
    cache = EncoderCache(max_bytes=100)
    stored: dict[int, int] = {}
    for key, size in entries:
        cache.put(key, {"hidden": torch.zeros(size, dtype=torch.uint8)})
        stored.pop(key, None)
        stored[key] = size
        kept = {key: result for key in stored if (result := cache.get(key)) is not None}
        assert count_bytes(kept) <= 100
        newest: list[int] = []
        for name in reversed(stored):
            if sum(stored[other] for other in newest) + stored[name] > 100:
                break
            newest.append(name)
        assert set(kept) == set(newest)
        stored = {name: stored[name] for name in stored if name in kept}


def test_a_result_that_is_used_again_stays_in_the_cache() -> None:
    cache = EncoderCache(max_bytes=10)
    for key in ("negative", "a", "b", "c"):
        cache.put(key, torch.zeros(4, dtype=torch.uint8))
        assert cache.get("negative") is not None
    assert [key for key in "abc" if cache.get(key) is not None] == ["c"]
    cache.put("large", torch.zeros(11, dtype=torch.uint8))
    assert cache.get("large") is None and cache.get("c") is not None


def test_equal_texts_are_encoded_once(painter: AnyPipeline) -> None:
    encoder = painter.pipeline.text_encoder
    before = len(encoder.calls)
    rows = [paint_row(str(k), "the same text", seed=k) for k in range(20)]
    run(painter, rows)
    assert encoder.calls[before:] == [ENCODE_BATCH] * 2, "the prompt and the negative prompt"
    before = len(encoder.calls)
    run(painter, [paint_row(str(k), seed=k) for k in range(16)])
    assert len(encoder.calls) - before == 1 + 16 / ENCODE_BATCH


def test_copies_of_an_encoded_text_are_made_when_a_row_continues(
    painter: AnyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies for 32 images of one prompt could need gigabytes."""
    events: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return record

    monkeypatch.setattr(evaluator, "clone_tensors", recorded("copy", clone_tensors))
    monkeypatch.setattr(CallStacker, "_resume", recorded("continue", CallStacker._resume))
    with open_stacker(painter) as stacker:
        start(stacker, painter, [paint_row(str(k), "the same text", guidance=1.0) for k in range(4)])
    assert events[-8:] == ["copy", "continue"] * 4


def test_an_encoder_result_that_a_pipeline_modifies_is_not_shared(models: Models) -> None:
    model = models[painting.ModifyingPipeline]
    rows = [paint_row(str(k), "the same text", guidance=1.0, seed=1) for k in range(3)]
    images = list(map(image_of, run(model, rows).values()))
    assert all(torch.equal(image, images[0]) for image in images)
    assert model.plan.is_stacked


# Plans


@pytest.mark.parametrize("pipeline_type", STACKED, ids=lambda item: item.__name__)
def test_calls_are_stacked(models: Models, pipeline_type: Any) -> None:
    plan = models[pipeline_type].plan
    assert plan.is_stacked
    assert not plan.is_alone
    mixes_images = pipeline_type is painting.BatchNormPipeline
    assert plan.reasons == (("vae does not compute the rows of a batch separately",) if mixes_images else ())
    names = {network.name for network in plan.networks}
    assert names - plan.axes.keys() == (
        {"vae"} if mixes_images else {"text_encoder"} if pipeline_type is painting.ListPipeline else set()
    )
    assert (set(plan.paddings), set(plan.stand_ins)) == (
        {"transformer"} if pipeline_type is painting.MaskedPipeline else set(),
        {"transformer"} if pipeline_type is painting.ListPipeline else set(),
    )


def test_padding_follows_from_the_longest_text(models: Models) -> None:
    padding = models[painting.MaskedPipeline].plan.paddings["transformer"]
    assert (padding.text, padding.mask, padding.length) == ("text", "text_mask", painting.MAX_LENGTH)


@pytest.mark.parametrize("pipeline_type", ALONE, ids=lambda item: item.__name__)
def test_rows_that_would_affect_each_other_run_alone(models: Models, pipeline_type: Any) -> None:
    plan = models[pipeline_type].plan
    assert plan.is_alone
    assert not plan.is_stacked
    (reason,) = plan.reasons
    assert (
        reason
        == {
            painting.VaryingPipeline: "it takes texts of different lengths without a mask",
            painting.ChunkingPipeline: "transformer does not compute the rows of a batch separately",
            painting.RoutingPipeline: "a row depends on other rows in the batch",
            painting.StoringPipeline: "a row depends on other rows in the batch",
        }[pipeline_type]
    )


def test_other_denoisers_are_stacked_if_one_cannot_be(models: Models) -> None:
    plan = models[painting.PartlyStackedPipeline].plan
    assert (plan.is_stacked, plan.is_alone) == (False, False)
    assert plan.reasons == ("prior_transformer does not compute the rows of a batch separately",)
    assert plan.axes.keys() == {"transformer", "text_encoder", "vae"}


def test_noise_from_the_global_generator_is_refused() -> None:
    with pytest.raises(ModelError, match=r"GlobalNoisePipeline with .* draws noise \(randn_like\)"):
        load_painting(painting.GlobalNoisePipeline)


# Rows


def rows_for(pipeline_type: Any) -> list[PromptRequest]:
    rows = [paint_row("a", seed=1), paint_row("b", "a much longer text", seed=2, steps=6)]
    rows += [paint_row("c", seed=3, guidance=1.0), paint_row("d", "star", seed=4, guidance=2.0, steps=1)]
    if "negative_prompt" in pipeline_type.__call__.__code__.co_varnames:
        rows += [paint_row("e", seed=5, negative="green"), paint_row("f", "", seed=6, negative="")]
    return rows


@pytest.mark.parametrize("pipeline_type", STACKED + PARTLY_STACKED + ALONE, ids=lambda item: item.__name__)
def test_no_bit_depends_on_the_neighbours(models: Models, pipeline_type: Any) -> None:
    model, rows = models[pipeline_type], rows_for(pipeline_type)
    alone = {row.id: image_of(run(model, [row])[row.id]) for row in rows}
    others = [paint_row(f"other {k}", "and more " * k, seed=k, steps=1 + k, guidance=1 + k % 2) for k in range(5)]
    for order in ([*rows, *others], [*others[:2], *rows[::-1], *others[2:]], [*rows[3:], *others, *rows[:3]]):
        together = run(model, order)
        for name, image in alone.items():
            assert torch.equal(image_of(together[name]), image), name
    for row in rows:
        expected = copy_pipeline(model.pipeline, CPU, host_timesteps=False)(**model.make_arguments(row)).images
        torch.testing.assert_close(alone[row.id], expected, rtol=1e-5, atol=1e-5)
    assert len({image.sum().item() for image in alone.values()}) == len(rows)


@pytest.mark.parametrize("pipeline_type", STACKED, ids=lambda item: item.__name__)
def test_rows_share_denoiser_calls(models: Models, pipeline_type: Any) -> None:
    model = models[pipeline_type]
    calls = model.pipeline.transformer.calls
    before = len(calls)
    run(model, [paint_row(str(k), "a" * (k + 1), seed=k) for k in range(4)])
    sequential = pipeline_type in (painting.SequentialPipeline, painting.MaskedPipeline)
    stand_ins = 2 * (pipeline_type is painting.ListPipeline)
    assert calls[before:] == [8 + stand_ins] * (8 if sequential else 4)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("refused", ValueError("such a prompt is refused")),
        ("broken", RuntimeError("the loop is broken")),
        ("poison", RuntimeError("the network gets values that are not finite")),
    ],
)
@pytest.mark.parametrize("pipeline_type", [painting.PaintingPipeline, painting.AutocastPipeline])
def test_an_error_fails_only_its_row(models: Models, pipeline_type: Any, prompt: str, error: Exception) -> None:
    model, others = models[pipeline_type], rows_for(pipeline_type)
    expected = run(model, others)
    ended = run(model, [*others[:2], paint_row("bad", prompt, steps=5), *others[2:]])
    bad = ended.pop("bad")
    assert (type(bad.error), str(bad.error)) == (type(error), str(error))
    assert bad.error is not None
    assert bad.error.__traceback__ is None
    assert bad.result is None
    for name, row in ended.items():
        assert torch.equal(image_of(row), image_of(expected[name]))


def test_autocast_belongs_to_its_row(models: Models) -> None:
    """Also after an error in the call of another row."""
    model = models[painting.AutocastPipeline]
    run(model, [paint_row("a"), paint_row("bad", "poison"), paint_row("b", steps=6)])
    assert model.pipeline.transformer.dtype_of_product == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_a_row_that_needs_more_slots_than_there_are_makes_its_calls_alone(painter: AnyPipeline) -> None:
    rows = [paint_row("a"), paint_row("b", guidance=1.0), paint_row("c")]
    ended = run(painter, rows, slots=1)
    assert {name: row.error for name, row in ended.items()} == dict.fromkeys("abc")
    assert set(painter.pipeline.transformer.calls[-12:]) == {1, 2}


def test_the_next_call_advances_no_row(painter: AnyPipeline) -> None:
    rows = [paint_row("a", steps=2), paint_row("b", steps=2)]
    expected = run(painter, rows)
    with open_stacker(painter) as stacker:
        start(stacker, painter, rows)
        call = stacker.next_call()
        call()
        call()
        assert all(torch.equal(image_of(row), image_of(expected[tag])) for tag, row in run_to_the_end(stacker).items())


def test_a_row_without_guidance_overtakes_if_one_slot_is_free(painter: AnyPipeline) -> None:
    with open_stacker(painter, slots=3) as stacker:
        start(stacker, painter, [paint_row("a"), paint_row("b"), paint_row("c", guidance=1.0)])
        assert (stacker.free_slots, len(stacker.waiting)) == (0, 1)
        stacker.tick()
        assert (stacker.evaluator.last_used, stacker.evaluator.last_size) == (3, 3)


def test_no_row_waits_forever_while_new_rows_share_other_calls(models: Models) -> None:
    model = models[painting.MaskedPipeline]
    unpadded: Any = SimpleNamespace(
        pipeline=model.pipeline, plan=replace(model.plan, paddings={}), make_arguments=model.make_arguments
    )
    with open_stacker(unpadded) as stacker:
        start(stacker, unpadded, [paint_row("long", "a longer prompt than the others", steps=3, guidance=1.0)])
        start(stacker, unpadded, [paint_row(str(k), "cat", steps=1 + k, guidance=1.0) for k in range(6)])
        ended: list[str] = []
        for number in range(4 * MAX_WAITING_TICKS):
            stacker.tick()
            stacker.finish_decoding()
            ended += (tags := [row.tag for row in stacker.take_ended()])
            start(stacker, unpadded, [paint_row(f"{number}-{tag}", "cat", steps=6, guidance=1.0) for tag in tags])
    assert len(ended) > 50
    assert ended.count("long") == 1


# Ends


def count_objects() -> Counter[str]:
    """Count live greenlets, pipelines, schedulers and tensors."""
    gc.collect()
    kinds = {"greenlet": greenlet, "pipeline": painting.PaintingPipeline, "tensor": torch.Tensor}
    types = Counter(map(type, gc.get_objects()))
    return Counter({
        name: sum(count for one, count in types.items() if issubclass(one, kind)) for name, kind in kinds.items()
    })  # fmt: skip


def test_a_close_midway_restores_the_networks_and_leaves_no_greenlet(painter: AnyPipeline) -> None:
    run(painter, [paint_row("first")])
    before = count_objects()
    with open_stacker(painter, slots=4) as stacker:
        start(stacker, painter, [paint_row(str(k), seed=k) for k in range(5)])
        stacker.tick()
        assert "forward" in vars(painter.pipeline.transformer)
        assert count_objects()["greenlet"] == before["greenlet"] + 5
    del stacker
    assert_restored(painter)
    assert count_objects() == before


def test_a_close_midway_frees_tensors_without_garbage_collection(painter: AnyPipeline) -> None:
    """Garbage collection may come much later than the next batch, which needs the memory."""
    run(painter, [paint_row("first")])
    gc.collect()
    gc.disable()
    try:
        with open_stacker(painter, slots=4) as stacker:
            start(stacker, painter, [paint_row(str(k), seed=k) for k in range(5)])
            stacker.tick()
            rows = list(stacker._rows.values())
            tensors = [
                weakref.ref(value)
                for row in rows
                for value in (row.call.arguments.values() if row.call else ())
                if isinstance(value, torch.Tensor)
            ]
            del rows
            assert len(tensors) >= 10
        assert [tensor() for tensor in tensors if tensor() is not None] == []
    finally:
        gc.enable()


def test_many_rows_leave_nothing_behind(painter: AnyPipeline) -> None:
    names = ["refused", "broken", "poison", *("a fine row" for _ in range(7))]

    def run_some(stacker: CallStacker[str], first: int) -> None:
        rows = [paint_row(str(k), names[k % 10], seed=k, steps=1 + k % 3) for k in range(first, first + 50)]
        start(stacker, painter, rows)
        ended = run_to_the_end(stacker)
        assert len(ended) == 50
        assert sum(row.error is None for row in ended.values()) >= 35

    with open_stacker(painter, slots=16) as stacker:
        run_some(stacker, 0)
        before = count_objects()
        for first in range(50, 1000, 50):
            run_some(stacker, first)
        assert count_objects() == before
        assert not stacker.has_rows
        assert stacker.free_slots == 16
    assert_restored(painter)


END = Callable[[AnyPipeline, CallStacker[str]], None]


def end_rows(model: AnyPipeline, stacker: CallStacker[str]) -> None:
    start(stacker, model, [paint_row("a"), paint_row("b")])
    run_to_the_end(stacker)


def fail_rows(model: AnyPipeline, stacker: CallStacker[str]) -> None:
    start(stacker, model, [paint_row("a", "broken"), paint_row("b", "poison"), paint_row("c", "refused")])
    assert all(row.error for row in run_to_the_end(stacker).values())


def close_midway(model: AnyPipeline, stacker: CallStacker[str]) -> None:
    start(stacker, model, [paint_row("a"), paint_row("b")])
    stacker.tick()


def run_out_of_memory(model: AnyPipeline, stacker: CallStacker[str]) -> None:
    start(stacker, model, [paint_row("a"), paint_row("b")])
    stacker.tick()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.pipeline.transformer, "memory", 1)
        stacker.tick()


def be_interrupted(model: AnyPipeline, stacker: CallStacker[str]) -> None:
    """Raise an exception in a row that is not an error of it."""
    start(stacker, model, [paint_row("a"), paint_row("b")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMatchEulerDiscreteScheduler, "step", interrupt)
        stacker.tick()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", [end_rows, fail_rows, close_midway, run_out_of_memory, be_interrupted])
@pytest.mark.parametrize("has_autocast", [False, True])
@pytest.mark.parametrize("pipeline_type", [painting.PaintingPipeline, painting.AutocastPipeline])
def test_no_end_changes_the_state_of_torch(models: Models, pipeline_type: Any, has_autocast: bool, end: END) -> None:
    model = models[pipeline_type]
    with torch.autocast("cpu", torch.float16, enabled=has_autocast):
        state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        with suppress(torch.OutOfMemoryError, KeyboardInterrupt), open_stacker(model) as stacker:
            end(model, stacker)
        assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == state
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert_restored(model)
    assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_copies_share_networks_and_no_scheduler(models: Models) -> None:
    pipeline = models[painting.NestedPipeline].pipeline
    copied = copy_pipeline(pipeline, CPU, host_timesteps=True)
    assert copied.prior_pipe is not pipeline.prior_pipe
    assert copied.prior_pipe.transformer is pipeline.prior_pipe.transformer
    schedulers = [copied.scheduler, copied.prior_pipe.scheduler, copied.decoder_pipe.scheduler]
    assert all(scheduler is schedulers[0] for scheduler in schedulers), "as in the pipeline"
    assert schedulers[0] is not pipeline.scheduler
    copied.scheduler.set_timesteps(3, device="meta")
    assert copied.scheduler.timesteps.device == CPU
    names = [network.name for network in find_networks(pipeline)]
    assert names == ["transformer", "prior_transformer", "text_encoder", "vae"]


def test_a_method_that_diffusers_wraps_without_its_signature_has_its_own_parameters() -> None:
    """diffusers 0.41 does so with `decode` of the autoencoders."""

    def wrap(method: Callable[..., None]) -> Callable[..., None]:
        return lambda self, *args, **kwargs: method(self, *args, **kwargs)

    class Autoencoder(torch.nn.Module):
        @wrap
        def decode(self, z: torch.Tensor, return_dict: bool = True) -> None:
            """Has parameters with names."""

    network = Network("vae", Autoencoder(), "decode", torch.device("cpu"))
    assert network.parameters == ("z", "return_dict")
    assert network.bind((1,), {"return_dict": False}) == {"z": 1, "return_dict": False}
