"""The proof of an artifact: it computes its simulation and stores each weight once, or which operator is wrong."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from edgepack import contents
from edgepack.artifact import Artifact, Golden, Parity
from edgepack.contracts import FLOAT_LIMIT, INTEGERS, Census, Graph, Runtime, Step
from edgepack.divergence import Divergence, first_divergence
from edgepack.errors import EdgepackError, MissingExtra, ParityError, Unsupported
from edgepack.parity import check
from edgepack.samples import Array, compute, count, has_dynamic_batch, take
from edgepack.stepwise import stepwise
from edgepack.ties import CHOICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SUSPECT = 1e-5  # of float outputs; correct engines stay below


def prove(artifact: Artifact, runtime: Runtime, simulation: Graph) -> Parity:
    """Compare an artifact with its golden answers.

    Raises:
        ParityError: it differs; names the worst output, by how much, and the first operator that diverges. Outputs
            that agree less well than engines do are a reason to look at every operator.
    """
    try:
        parity = check(artifact, runtime)
    except ParityError as error:
        raise blamed(error, artifact, runtime, simulation) from error
    if parity.tied:
        _hold_ties(parity, artifact, runtime, simulation)
    if artifact.manifest.dialect.startswith(INTEGERS):
        return _operator_by_operator(parity, artifact, runtime, simulation)
    if parity.max_rel is not None and parity.max_rel > SUSPECT:
        _look_inside(artifact, runtime, simulation)
    return parity


def _operator_by_operator(parity: Parity, artifact: Artifact, runtime: Runtime, simulation: Graph) -> Parity:
    """Every rounded value of the file is that of the simulation but for single steps, where the engine shows them."""
    inputs = _worst_samples(artifact, runtime)
    try:
        steps = runtime.trace(artifact, inputs)
    except (Unsupported, MissingExtra):
        return parity
    found = stepwise(simulation, inputs, steps)
    if found.fault is not None:
        name = f"{artifact.manifest.format} {artifact.manifest.name!r}"
        raise ParityError(
            f"{name}: the outputs agree, an operator does not; {found.fault}", details=asdict(found.fault)
        )
    return replace(parity, rounded=found.compared, rounded_otherwise=found.worst_share)


def _hold_ties(parity: Parity, artifact: Artifact, runtime: Runtime, simulation: Graph) -> None:
    """On samples that were set aside as ties, the first float operator that diverges is a choice, and none before it.

    Raises:
        ParityError: it is another one.
    """
    if artifact.manifest.dialect.startswith(INTEGERS):
        return  # judged operator by operator, on one sample as on another
    golden = artifact.golden()
    for number in parity.tied:
        inputs = take(artifact.manifest.inputs, golden.inputs, number, number + 1)
        try:
            found = first_divergence(simulation, inputs, runtime.trace(artifact, inputs))
        except (Unsupported, MissingExtra):
            return
        if found.node is not None and not _after_choice(simulation, found):
            raise _inside(artifact, found, "samples near a tie differ before any choice")


def _after_choice(simulation: Graph, found: Divergence) -> bool:
    """Whether an operator chooses, or reads signs that were chosen, which files need not hold as numbers."""
    if found.operator in CHOICES:
        return True
    graph = simulation.program.module(check_guards=False).graph
    (node,) = (node for node in graph.nodes if node.name == found.node)
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    while source.op == "call_function" and source.all_input_nodes and str(source.target).startswith("aten.pad."):
        source = source.all_input_nodes[0]
    return str(source.target).startswith("aten.where.")


def _look_inside(artifact: Artifact, runtime: Runtime, simulation: Graph) -> None:
    inputs = _worst_samples(artifact, runtime)
    try:
        steps = runtime.trace(artifact, inputs)
    except (Unsupported, MissingExtra):
        return
    found = first_divergence(simulation, inputs, steps)
    if found.error is not None and found.error > FLOAT_LIMIT and found.operator not in CHOICES:
        raise _inside(artifact, found)


def _inside(
    artifact: Artifact, fault: Divergence, what: str = "the outputs agree, an operator does not"
) -> ParityError:
    name = f"{artifact.manifest.format} {artifact.manifest.name!r}"
    return ParityError(f"{name}: {what}; {fault}", details=asdict(fault))


def blamed(error: ParityError, artifact: Artifact, runtime: Runtime, simulation: Graph) -> ParityError:
    """The same error, with the first operator that diverges."""
    try:
        inputs = _worst_samples(artifact, runtime)
        found = _divergence(artifact, simulation, inputs, runtime.trace(artifact, inputs))
    except EdgepackError as reason:
        return ParityError(f"{error.message}; which operator cannot be told: {reason.message}", error.hint)
    return ParityError(f"{error.message}; {found}", error.hint, asdict(found))


def _divergence(artifact: Artifact, simulation: Graph, inputs: dict[str, Array], steps: list[Step]) -> Divergence:
    if artifact.manifest.dialect.startswith(INTEGERS):
        return stepwise(simulation, inputs, steps).fault or Divergence(None)
    return first_divergence(simulation, inputs, steps)


def hold_storage(simulation: Graph, census: Census, name: str) -> None:
    """Every weight is stored as often as the network has it.

    Raises:
        ParityError: a weight that operators share is in the file more than once; names the operators.
    """
    stored = contents.copies(census.contents)
    for values, (copies, names) in _weights(simulation).items():
        if stored.get(values, 0) > copies:
            users = _users(simulation, names)
            size = next(array.nbytes for found, array in _tensors(simulation) if found in names)
            found = Divergence(users[0] if users else None, "weight", names[0])
            raise ParityError(
                f"{name}: the weight {names[0]!r} of {', '.join(users)} is stored {stored[values]} times "
                f"({size} bytes each), the network has it {'once' if copies == 1 else f'{copies} times'}",
                details={**asdict(found), "sharers": users},
            )


def _worst_samples(artifact: Artifact, runtime: Runtime) -> dict[str, Array]:
    """The golden sample on which the artifact is furthest from its simulation, with a neighbour where it takes two.

    Some faults (axes of batch and sequence exchanged) cannot be seen in a batch of one.
    """
    golden, manifest = artifact.golden(), artifact.manifest
    session = runtime.load(artifact)
    try:
        found = compute(session.run, manifest.inputs, manifest.outputs, golden.inputs, size=1)
    finally:
        session.close()
    samples = range(count(manifest.inputs, golden.inputs))
    worst = max(samples, key=lambda index: _error(artifact, golden, found, index))
    rows = 2 if has_dynamic_batch(manifest.inputs) else 1
    start = max(min(worst, len(samples) - rows), 0)
    return take(manifest.inputs, golden.inputs, start, start + rows)


def _error(artifact: Artifact, golden: Golden, found: dict[str, Array], index: int) -> float:
    """Largest difference of one sample, in units of each output's largest value."""
    outputs = artifact.manifest.outputs
    one, other = (take(outputs, values, index, index + 1) for values in (found, golden.simulation))
    worst = 0.0
    for spec in outputs:
        if one[spec.name].shape != other[spec.name].shape:
            return float("inf")
        scale = float(np.abs(golden.simulation[spec.name]).max(initial=0.0)) or 1.0
        difference = np.abs(one[spec.name].astype(np.float64) - other[spec.name]).max(initial=0.0)
        worst = max(worst, float(np.nan_to_num(difference, nan=np.inf)) / scale)
    return worst


def _weights(simulation: Graph) -> dict[str, tuple[int, list[str]]]:
    """Values → how many separate tensors hold it, and all their names."""
    found: dict[str, tuple[int, list[str]]] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in _state(simulation):
        key = contents.key(tensor.detach().numpy())
        if key is None:
            continue
        place = (tensor.data_ptr(), tensor.numel())
        values = contents.values(key)
        copies, names = found.get(values, (0, []))
        found[values] = (copies + (place not in seen), [*names, name])
        seen.add(place)
    return found


def _state(simulation: Graph) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    program = simulation.program
    for name, value in {**program.state_dict, **program.constants}.items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _tensors(simulation: Graph) -> Iterator[tuple[str, Array]]:
    for name, tensor in _state(simulation):
        yield name, tensor.detach().numpy()


def _users(simulation: Graph, names: list[str]) -> list[str]:
    """Operators that read one of these weights."""
    signature = simulation.program.graph_signature
    lifted = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return [
        user.name
        for node in simulation.program.graph.find_nodes(op="placeholder")
        if lifted.get(node.name) in names
        for user in node.users
    ]
