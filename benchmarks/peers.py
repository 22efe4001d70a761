"""Importances that others use to prune without training, on this package's units.

Each gives every unit a value; the smallest goes first. A unit takes the sum over the positions it
occupies (an attention head has many, a channel one). What a library
offers is taken from it, with its own normalisation: torch-pruning divides a group's values by
their mean, so that groups can be ranked together, and so do the peers that are written here.

    random                 no information
    magnitude-l1, -l2      sum of |w|, of w^2 (Li et al. 2017, arXiv:1608.08710)
    bn-scale               batch norm's |gamma| (Liu et al. 2017, arXiv:1708.06519)
    lamp                   w^2 over the sum of all larger ones (Lee et al. 2021, arXiv:2010.07611)
    fpgm                   distance to the group's other filters (He et al. 2019, arXiv:1811.00250)
    taylor                 |w * dL/dw| (Molchanov et al. 2019, arXiv:1906.10771)
    activation             mean |activation| at the consumer's input
    wanda                  weight norm times input norm (Sun et al. 2023, arXiv:2306.11695)
    integrated-gradients   attribution of the true class (Sundararajan et al. 2017,
                           arXiv:1703.01365), at the consumer's input
    obs                    least squared error of the consumer when the rest of the layer takes
                           over (Hassibi & Stork 1993; in blocks: Kurtic et al. 2022,
                           arXiv:2203.07259)
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from cswap_deploy.config import RatioOf
from cswap_deploy.errors import UsageError, missing
from cswap_deploy.network.graph import Graph
from cswap_deploy.network.units import Group, Reader, channel_dim
from cswap_deploy.pruning.allocation import Values
from cswap_deploy.pruning.importance import Importance, View
from cswap_deploy.pruning.prepare import Prepared

CHUNK = 64
"""Images per forward or backward pass."""
ATTRIBUTED = 64
"""Images that are attributed: integrated gradients run the network once a step and consumer."""
STEPS = 8
"""Points on the path from zero to the activation (Gauss-Legendre)."""


class NotApplicableError(UsageError):
    """A ranking has nothing to say about a network."""


def random(view: View) -> Values:
    """No information; the floor that any ranking must beat."""
    return _normalised(view.groups, {g.name: view.rng.random(g.units) for g in view.groups})


def magnitude_l1(view: View) -> Values:
    """Sum of |w| over the layers of the group."""
    return _by_library(view, view.graph.module, "GroupMagnitudeImportance", p=1)


def magnitude_l2(view: View) -> Values:
    """Sum of w^2 over the layers of the group."""
    return _by_library(view, view.graph.module, "GroupMagnitudeImportance", p=2)


def bn_scale(view: View) -> Values:
    """Batch norm's |gamma|; a group without batch norm counts as average."""
    return _by_library(view, view.graph.module, "BNScaleImportance")


def lamp(view: View) -> Values:
    """Sum of w^2, over the sum of all that are not smaller in the group."""
    return _by_library(view, view.graph.module, "LAMPImportance")


def fpgm(view: View) -> Values:
    """Distance to all other filters of the group: what is near the others can be replaced.

    Raises:
        NotApplicableError: The network has grouped convolutions; torch-pruning's FPGM indexes
            beyond their weights (1.6.1).
    """
    for name, layer in view.graph.module.named_modules():
        if isinstance(layer, nn.Conv2d) and 1 < layer.groups < layer.in_channels:
            raise NotApplicableError(f"FPGM does not take the grouped convolution {name}")
    return _by_library(view, view.graph.module, "FPGMImportance")


def taylor(view: View) -> Values:
    """Sum of |w * dL/dw|, L the mean cross-entropy of the calibration images."""
    module = copy.deepcopy(view.graph.module).requires_grad_(True)
    images, labels = view.calibration.images, view.calibration.labels
    for x, y in zip(torch.split(images, CHUNK), torch.split(labels, CHUNK), strict=True):
        loss = F.cross_entropy(module(x), y, reduction="sum") / len(images)
        loss.backward()  # type: ignore[no-untyped-call]
    return _by_library(view, module, "GroupTaylorImportance")


def activation(view: View) -> Values:
    """Mean |activation|, at the inputs of the layers that read the unit."""
    sizes = _input_norms(view, power=1)
    return _normalised(view.groups, _over_consumers(view.groups, lambda c: sizes[c.layer]))


def wanda(view: View) -> Values:
    """Norm of the weights that read a position, times the norm of what they read."""
    sizes = _input_norms(view, power=2)

    def score(consumer: Reader) -> Tensor:
        layer = view.graph.module.get_submodule(consumer.layer)
        return _input_weight_norms(layer) * sizes[consumer.layer].sqrt()

    return _normalised(view.groups, _over_consumers(view.groups, score))


def integrated_gradients(view: View) -> Values:
    """Share of each unit in the true class's logit, by captum's integrated gradients.

    The path leads from zero to the consumer's input, with everything else as it is; |attribution|
    is summed over positions and averaged over the first ``ATTRIBUTED`` images. All are parts of
    the same logit, but ranked as such they leave whole layers empty: ResNet-20 keeps .54 of 40 %
    with the refit, .82 when each group is divided by its mean.

    Raises:
        MissingDependencyError: captum is absent.
    """
    try:
        from captum.attr import IntegratedGradients  # type: ignore[import-untyped]
    except ImportError as err:
        raise missing("captum", "bench", err) from err
    images = view.calibration.images[:ATTRIBUTED]
    labels = view.calibration.labels[:ATTRIBUTED]
    found: dict[str, Tensor] = {}
    for layer in {c.layer for g in view.groups for c in g.consumers}:
        dim = channel_dim(view.graph.module.get_submodule(layer))
        for node in view.graph.readers(layer):
            for x, y in zip(
                torch.split(images, CHUNK // STEPS), torch.split(labels, CHUNK // STEPS),
                strict=True,
            ):  # fmt: skip
                forward, inputs = _after(view.graph, node, x)
                with torch.enable_grad():
                    shares = IntegratedGradients(forward).attribute(
                        inputs, baselines=0.0, target=y, n_steps=STEPS
                    )
                shares = shares.detach().double().abs().movedim(dim, -1)
                total = shares.reshape(-1, shares.shape[-1]).sum(0) / len(images)
                found[layer] = found.get(layer, 0.0) + total
    return _normalised(view.groups, _over_consumers(view.groups, lambda c: found[c.layer]))


def obs(view: View) -> Values:
    """Error that a unit's consumer is left with when all its other weights are solved again.

    Several consumers are added up as fractions of their outputs' variances. Groups are normalised
    by their means: ranked as fractions, ResNet-20 keeps .64 of 40 % with the refit, else .84.
    """
    moments = input_covariances(view)
    scores = {}
    for group in view.groups:
        total = np.zeros(group.units)
        for consumer in group.consumers:
            layer = view.graph.module.get_submodule(consumer.layer)
            errors, variance = removal_errors(layer, moments[consumer.layer], consumer)
            total += errors / max(variance, 1e-30)
        scores[group.name] = total
    return _normalised(view.groups, scores)


PEERS: dict[str, Importance] = {
    "random": Importance(random),
    "magnitude-l1": Importance(magnitude_l1),
    "magnitude-l2": Importance(magnitude_l2),
    "bn-scale": Importance(bn_scale),
    "lamp": Importance(lamp),
    "fpgm": Importance(fpgm),
    "taylor": Importance(taylor, needs_images=True),
    "activation": Importance(activation, needs_images=True),
    "wanda": Importance(wanda, needs_images=True),
    "integrated-gradients": Importance(integrated_gradients, needs_images=True),
    "obs": Importance(obs, needs_images=True),
}
WEIGHTS_ONLY = {name for name, peer in PEERS.items() if not peer.needs_images} - {"random"}
"""The same whatever the calibration set and the seed."""


def per_position(values: Values, groups: tuple[Group, ...]) -> Values:
    """Mean instead of sum over a unit's positions: how torch-pruning ranks whole heads."""
    return {g.name: values[g.name] / len(g.root_indices[0]) for g in groups}


def plainly(values: Values, network: Prepared, of: RatioOf) -> Values:
    """So that the loop, which divides by what a unit saves, ranks by the values alone."""
    return {
        name: found * network.sizes.saving(name, [0], of)
        for name, found in per_position(values, network.groups).items()
    }


# --- torch-pruning -------------------------------------------------------------------------------


def _by_library(view: View, module: nn.Module, importance: str, **settings: Any) -> Values:
    """Values of one of torch-pruning's importances, with its default normalisation."""
    import torch_pruning as tp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Fresh containers: the library's mutable defaults leak from one graph to the next.
        graph = tp.DependencyGraph().build_dependency(
            module, view.calibration.images[:2], unwrapped_parameters=[], ignored_layers=[],
            ignored_params=[], customized_pruners={}, verbose=False,
        )  # fmt: skip
        scores, silent = {}, []
        for group in view.groups:
            root = module.get_submodule(group.name)
            pruner = graph.get_pruner_of_module(root)
            coupled = graph.get_pruning_group(
                root, pruner.prune_out_channels, list(range(pruner.get_out_channels(root)))
            )
            found = getattr(tp.importance, importance)(**settings)(coupled)
            if found is None:
                silent.append(group.name)
                scores[group.name] = np.array([float(len(r)) for r in group.root_indices])
            else:
                values = found.detach().double()
                scores[group.name] = np.array(
                    [float(values[list(r)].sum()) for r in group.root_indices]
                )
    if len(silent) == len(view.groups):
        raise NotApplicableError(f"torch-pruning's {importance} finds nothing to score here")
    return scores


# --- what consumers read -------------------------------------------------------------------------


def _over_consumers(groups: tuple[Group, ...], score: Callable[[Reader], Tensor]) -> Values:
    """Sum, over a unit's consumers and positions, of a score for each input of a consumer."""
    totals = {}
    for group in groups:
        total = np.zeros(group.units)
        for consumer in group.consumers:
            values = score(consumer)
            total += [float(values[list(indices)].sum()) for indices in consumer.indices]
        totals[group.name] = total
    return totals


def _normalised(groups: tuple[Group, ...], scores: Values) -> Values:
    """Divide by the group's mean per position, as torch-pruning does."""
    return {
        g.name: scores[g.name] * len(g.root_indices[0]) / max(scores[g.name].mean(), 1e-30)
        for g in groups
    }


def _observe(view: View, see: Callable[[str, fx.Node, Tensor], None]) -> None:
    """Call ``see(layer, node, input)`` for every consumer, a chunk of images at a time."""

    layers = {c.layer for g in view.groups for c in g.consumers}
    layer_of = {node: layer for layer in layers for node in view.graph.readers(layer)}
    with torch.inference_mode():
        for part in torch.split(view.calibration.images, CHUNK):
            for node, env in view.graph.step(part):
                if node in layer_of:
                    see(layer_of[node], node, view.graph.value(_source(node), env))


def _input_norms(view: View, *, power: int) -> dict[str, Tensor]:
    """Consumer -> (I,) float64 mean |input|^power over images and positions."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def see(layer: str, node: fx.Node, x: Tensor) -> None:
        rows = x.movedim(channel_dim(view.graph.module.get_submodule(layer)), -1)
        rows = rows.reshape(-1, rows.shape[-1])
        sums[layer] = sums.get(layer, 0.0) + rows.double().abs().pow(power).sum(0)
        counts[layer] += len(rows)

    _observe(view, see)
    return {layer: sums[layer] / counts[layer] for layer in sums}


def _input_weight_norms(layer: nn.Module) -> Tensor:
    """(I,) float64 Euclidean norm of the weights that read each input."""
    weight = layer.weight.detach().double()  # type: ignore[operator]
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    parts = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    per_group = parts.unflatten(0, (groups, -1)).pow(2).sum((1, 3)).sqrt()
    return per_group.flatten()  # type: ignore[no-any-return]


# --- integrated gradients ------------------------------------------------------------------------


def _after(graph: Graph, node: fx.Node, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The network as a function of one consumer's input, and that input for some images."""
    suffix, source = graph.suffix([node]), _source(node)
    with torch.no_grad():
        _, kept = graph.run(x, keep={*suffix.cached, source})
    cached = {n: kept[n] for n in suffix.cached}

    def forward(given: Tensor) -> Tensor:
        # captum lays the steps out as (steps * images), which is how variants are laid out.
        return graph.run_suffix(
            suffix, dict(cached), images=len(x), variants=len(given) // len(x),
            replace={
                node: lambda n, env: graph.execute(n, {**env, source: given}, batch=len(given))
            },
        )  # fmt: skip

    return forward, kept[source]


# --- reconstruction error ------------------------------------------------------------------------


def input_covariances(view: View) -> dict[str, Tensor]:
    """Consumer -> (G, F, F) float64 covariance of what each output sees, a convolution group each.

    F counts a group's inputs times kernel positions, in the order of ``weight.flatten(1)``.
    """
    grams: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)

    def see(layer: str, node: fx.Node, x: Tensor) -> None:
        rows = _seen(node, view.graph.module.get_submodule(layer), x)
        grams[layer] = grams.get(layer, 0.0) + (rows.transpose(1, 2) @ rows).double()
        sums[layer] = sums.get(layer, 0.0) + rows.sum(1, dtype=torch.float64)
        counts[layer] += rows.shape[1]

    _observe(view, see)
    means = {layer: sums[layer] / counts[layer] for layer in sums}
    return {
        layer: gram / counts[layer] - means[layer][:, :, None] * means[layer][:, None, :]
        for layer, gram in grams.items()
    }


def _seen(node: fx.Node, layer: nn.Module, x: Tensor) -> Tensor:
    """(G, rows, F) what each output position of a consumer sees."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    # The node's own stride and so on: "same" padding is done outside the convolution, for one.
    given: list[Any] = list(node.args[3:6])
    stride, padding, dilation = given + [1, 0, 1][len(given) :]
    patches = F.unfold(x.contiguous(), layer.kernel_size, dilation, padding, stride)
    images, _, places = patches.shape
    by_group = patches.view(images, layer.groups, -1, places)
    return by_group.permute(1, 0, 3, 2).flatten(1, 2)


def removal_errors(
    layer: nn.Module, covariance: Tensor, consumer: Reader, *, ridge: float = 1e-3
) -> tuple[np.ndarray, float]:
    """Least squared error of a layer's output without each unit, the rest solved again.

        error[u] = sum_o w[o, S] (inv(H)[S, S])^-1 w[o, S]'

    with H the covariance of the layer's inputs (the bias takes the mean over), S the inputs that
    belong to unit u, and w the layer's weights.

    Args:
        layer: A convolution or linear layer.
        covariance: (G, F, F), see ``input_covariances``.
        consumer: Where the units are among the layer's inputs.
        ridge: Added to the diagonal of H, as a fraction of its mean.

    Returns:
        (units,) mean squared error over images and positions, summed over outputs; and the
        outputs' variance, summed too.
    """
    weight = layer.weight.detach().double()  # type: ignore[operator]
    groups, features = covariance.shape[:2]
    in_group = weight.shape[1]
    kernel = torch.arange(features // in_group)
    rows = weight.flatten(1).unflatten(0, (groups, -1))
    strength = ridge * covariance.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(covariance + strength * torch.eye(features, dtype=torch.float64))
    variance = float(((rows @ covariance) * rows).sum())
    errors = np.zeros(len(consumer.indices))
    for unit, indices in enumerate(consumer.indices):
        for group in {i // in_group for i in indices}:
            local = torch.tensor([i % in_group for i in indices if i // in_group == group])
            seen = (local[:, None] * len(kernel) + kernel).flatten()
            w = rows[group][:, seen]
            solved = torch.linalg.solve(inverse[group][seen][:, seen], w.T)
            errors[unit] += float((w.T * solved).sum())
    return errors, variance


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source
