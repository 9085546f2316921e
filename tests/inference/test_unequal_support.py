"""Every method on a support set of very unequal classes, as `predict` and `transfer=own` have them: against plain loops over its items."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import build, choices, compose, toy_images
from torch import Tensor, nn

from metarun.core import Batch
from metarun.target.base import Own

IMAGES = toy_images()
WAYS = 2
SIZES = [(18, 2), (1, 300)]
# Small, so that 301 images in a sequence take no time, and without a norm, so that features are each image's own.
NET = ["backbone=mlp", "backbone.hidden=[6]", "backbone.norm=none", "backbone.init_std=null"]
# Checked elsewhere against plain computations with unequal classes.
ELSEWHERE = {
    "test_unequal": {"protonet", "r2d2", "matchingnet", "feat", "simpleshot", "tim", "maml", "protomaml"},
    "test_target_images": {"dn4", "snail", "mann", "oml", "anml", "prototransfer"},
    "test_on_features": {
        "alpha_tim", "bdcspn", "laplacianshot", "ptmap", "soft_k_means", "transductive_fine_tuning", "tip_adapter",
        "tip_adapter_f", "frn", "deepbdc", "caml",
    },
    "test_few_labels": {"semi_protonet", "semi_protonet_cluster", "semi_protonet_masked"},
}  # fmt: skip


def made(name: str) -> Any:
    torch.manual_seed(0)
    config = compose(f"algo={name}", *NET, f"task.ways={WAYS}", "train.task.ways=null", "train.task.shots=null")
    for key, most in {"inner_steps": 3, "test_inner_steps": 3, "latent_size": 4}.items():
        if config.algo.get(key):
            config.algo[key] = most
    algorithm: Any = build(config, IMAGES).double().eval()
    if hasattr(algorithm, "head_epochs"):
        algorithm.head_epochs = 2
    with torch.no_grad():
        for value in algorithm.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return algorithm


def task(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Support images in no order, their classes, and queries."""
    draw = torch.Generator().manual_seed(3)
    y = torch.arange(WAYS).repeat_interleave(torch.tensor(sizes))
    x = torch.rand(len(y), 1, 16, 16, generator=draw, dtype=torch.float64) + 0.5 * y[:, None, None, None]
    order = torch.randperm(len(y), generator=draw)
    queries = 1.5 * torch.rand(5, 1, 16, 16, generator=draw, dtype=torch.float64)
    return x[order], y[order], queries


def descended(learned: list[nn.Parameter], loss: Callable[[], Tensor], rate: float, steps: int) -> None:
    """Plain gradient descent, in place."""
    for _ in range(steps):
        for value, slope in zip(learned, torch.autograd.grad(loss(), learned), strict=True):
            value.data -= rate * slope


def each(x: Tensor, y: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean cross-entropy, item by item."""
    losses = [-logits(item[None]).log_softmax(1)[0, label] for item, label in zip(x, y, strict=True)]
    return torch.stack(losses).mean()


def by_maml(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    learned = [*own.backbone.parameters(), *own.head.parameters()]
    descended(learned, lambda: each(x, y, own), own.inner.lr, 3)
    return own(queries).detach()


def by_head(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """ANIL and MTL: the head alone."""
    own = copy.deepcopy(algorithm)
    known = own.backbone(x).detach()
    descended(list(own.head.parameters()), lambda: each(known, y, own.head), own.inner.lr, 3)
    return own.head(own.backbone(queries)).detach()


def by_body(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    descended(list(own.backbone.parameters()), lambda: each(x, y, own), own.inner.lr, 3)
    return own(queries).detach()


def by_rates(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """Meta-SGD and MAML++, whose rates are parameters."""
    own = copy.deepcopy(algorithm)
    named = {name: value for name, value in own.named_parameters() if name.startswith(("backbone.", "head."))}
    for step in range(3):
        slopes = torch.autograd.grad(each(x, y, own), list(named.values()))
        for (name, value), slope in zip(named.items(), slopes, strict=True):
            rate = own.rates[name.replace(".", "_")].detach()
            value.data -= (rate if rate.shape == value.shape else rate[step]) * slope
    return own(queries).detach()


def by_curvature(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    named = {name: value for name, value in own.named_parameters() if not name.startswith("curvature.")}
    for _ in range(3):
        slopes = torch.autograd.grad(each(x, y, own), list(named.values()))
        for (name, value), slope in zip(named.items(), slopes, strict=True):
            factors = [factor.detach() for factor in own.factors(name)]
            turned = factors[0] * slope if slope.ndim == 1 else factors[0] @ slope @ factors[1].T
            value.data -= own.inner.lr * turned
    return own(queries).detach()


def by_imaml(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    learned, start = list(own.parameters()), [value.detach().clone() for value in own.parameters()]

    def loss() -> Tensor:
        pull = torch.stack([(w - w0).square().sum() for w, w0 in zip(learned, start, strict=True)]).sum()
        found: Tensor = each(x, y, own) + own.proximal_weight / 2 * pull
        return found

    descended(learned, loss, own.inner.lr, 3)
    return own(queries).detach()


def by_cavia(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    own.context.data.zero_()
    own.context.requires_grad_()
    descended([own.context], lambda: each(x, y, own), own.inner.lr, 3)
    return own(queries).detach()


def by_hsml(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """The pairs in the order of the support set, class by class."""
    own = copy.deepcopy(algorithm)
    order = y.argsort(stable=True)
    state, states = torch.zeros(1, own.root.bias.shape[0], dtype=torch.float64), []
    for item, label in zip(x[order], y[order], strict=True):
        pair = torch.cat([own.backbone(item[None]), F.one_hot(label[None], WAYS).double()], 1)
        state = own.encoder(pair, state)
        states.append(state)
    g = torch.cat(states).mean(0).detach()
    told = torch.cat([g, own.climb(g)]).detach()
    for name, value in own.named_parameters():
        if name.startswith(("backbone.", "head.")):
            value.data *= torch.sigmoid(4.0 + own.gates[name.replace(".", "_")](told)).view(value.shape).detach()
    return by_maml(own, x, y, queries)


def by_lstm(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm)
    named = [value for name, value in own.named_parameters() if name.startswith(("backbone.", "head."))]
    theta, state = nn.utils.parameters_to_vector(named).detach(), None
    gates = theta.new_zeros(2, len(theta))

    def seen(value: Tensor) -> Tensor:
        size = value.abs().clamp(min=np.exp(-10.0)).log() / 10
        return torch.stack([size, (value * np.exp(10.0)).clamp(-1, 1)])

    for _ in range(3):
        nn.utils.vector_to_parameters(theta, named)
        loss = each(x, y, own)
        slope = torch.cat([part.flatten() for part in torch.autograd.grad(loss, named)])
        state = own.lstm(torch.cat([seen(slope), seen(loss.detach()[None]).expand(2, len(theta))]), state)
        inputs = torch.cat([state[0], theta[None]])
        total = torch.stack([
            own.gates.weight[gate] @ torch.cat([inputs, gates[gate][None]]) + own.gates.bias[gate] for gate in (0, 1)
        ])  # fmt: skip
        gates = total.sigmoid().detach()
        state = tuple(part.detach() for part in state)
        theta = gates[0] * theta - gates[1] * slope
    nn.utils.vector_to_parameters(theta, named)
    return own(queries).detach()


def by_l2l(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    own = copy.deepcopy(algorithm).requires_grad_(True)
    order = y.argsort(stable=True)  # a task's random weights are seeded by its support images
    episode = Own(algorithm).fit(Batch(x[order], y[order], y), WAYS)._episode(queries)
    theta = algorithm.draw(episode)[0][0]
    named = [value for name, value in own.named_parameters() if name.startswith(("backbone.", "head."))]
    state: Any = [None, None]
    for _ in range(own.test_steps):
        nn.utils.vector_to_parameters(theta, named)
        slope = torch.cat([part.flatten() for part in torch.autograd.grad(each(x, y, own), named)])
        with torch.no_grad():
            update, state = own.optimizer(slope, state)
        theta = theta + update
    nn.utils.vector_to_parameters(theta, named)
    return own(queries).detach()


def by_reptile(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """Adam with beta1 = 0 on mini-batches of shuffled passes over the support set, class by class."""
    own = copy.deepcopy(algorithm)
    order = y.argsort(stable=True)
    x, y = x[order], y[order]
    waiting: list[int] = []
    draw = torch.Generator().manual_seed(0)
    batch, moments = min(own.test_inner_batch, len(x)), [torch.zeros_like(value) for value in own.parameters()]
    for step in range(1, 4):
        while len(waiting) < batch:
            waiting += torch.randperm(len(x), generator=draw).tolist()
        rows, waiting = waiting[:batch], waiting[batch:]
        slopes = torch.autograd.grad(each(x[rows], y[rows], own), list(own.parameters()))
        for value, moment, slope in zip(own.parameters(), moments, slopes, strict=True):
            moment.mul_(own.inner_beta2).add_((1 - own.inner_beta2) * slope.square())
            value.data -= own.inner.lr * slope / ((moment / (1 - own.inner_beta2**step)).sqrt() + 1e-8)
    return own(queries).detach()


def by_leo(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    known, asked = (F.normalize(algorithm.backbone(part), dim=1).detach() for part in (x, queries))
    encoded = algorithm.encoder(known).detach()
    codes = []
    for way in range(WAYS):
        pairs = [torch.cat([one, other]) for one in encoded[y == way] for other in encoded]
        codes.append(algorithm.relation(torch.stack(pairs)).mean(0).chunk(2)[0])
    z = torch.stack(codes).detach().requires_grad_()

    def loss(w: Tensor) -> Tensor:
        return WAYS * each(known, y, lambda item: item @ w.T)

    def decoded(z: Tensor) -> Tensor:
        found: Tensor = algorithm.decoder(z).chunk(2, -1)[0]
        return found

    for _ in range(3):
        z.data -= algorithm.inner_rate.detach() * torch.autograd.grad(loss(decoded(z)), z)[0]
    w = decoded(z).detach().requires_grad_()
    for _ in range(algorithm.finetune_steps):
        w.data -= algorithm.finetune_rate.detach() * torch.autograd.grad(loss(w), w)[0]
    return (asked @ w.T).detach()


def by_relation(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """Each pair of a class, the sum of its items, and a query, one beside the other."""
    net = algorithm.relation
    rows = []
    for query in algorithm.backbone(queries):
        row = []
        for way in range(WAYS):
            pair = torch.cat([algorithm.backbone(x[y == way]).sum(0), query])[None, :, None, None]
            row.append(net.score(net.hidden(net.second(net.first(pair).relu()).relu().flatten(1)).relu())[0, 0])
        rows.append(torch.stack(row))
    return torch.stack(rows).detach()


def by_svm(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """Crammer and Singer's problem of two classes in its dual form, one item after the other solved exactly, again and again."""
    known = algorithm.backbone(x).detach()
    # What is added to the kernel is as if each item had a coordinate of its own, which no query has.
    known = torch.cat([known, algorithm.diagonal**0.5 * torch.eye(len(known)).double()], 1)
    asked = F.pad(algorithm.backbone(queries).detach(), (0, len(x)))

    p = torch.full((len(x),), 0.5, dtype=torch.float64)  # an item's coefficients are cost times p and -p
    sign = F.one_hot(y, WAYS).double() - F.one_hot(1 - y, WAYS).double()
    kernel = known @ known.T
    signed = kernel * (sign @ sign.T)
    for _ in range(60):
        for i in range(len(x)):
            slope = algorithm.cost * signed[i] @ p - 1
            p[i] = (p[i] - slope / (algorithm.cost * signed[i, i])).clamp(0, 1)
    w = known.T @ (algorithm.cost * p[:, None] * sign)
    return (algorithm.scale * asked @ w).detach()


def by_logistic(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    from scipy.optimize import minimize

    known, asked = (F.normalize(algorithm.backbone(part), dim=1).detach() for part in (x, queries))
    shares = []
    for cost in algorithm.costs:

        def objective(flat: np.ndarray, cost: float = cost) -> tuple[float, np.ndarray]:
            w = torch.tensor(flat, requires_grad=True)
            matrix = w.view(WAYS, -1)
            logs = (known @ matrix[:, :-1].T + matrix[:, -1]).log_softmax(1)
            loss = matrix[:, :-1].square().sum() / 2
            for way in range(WAYS):
                loss = loss - cost * logs[y == way, way].sum()
            return loss.item(), torch.autograd.grad(loss, w)[0].numpy()

        found = minimize(objective, np.zeros(WAYS * (known.shape[1] + 1)), jac=True, tol=1e-13, method="BFGS").x
        matrix = torch.tensor(found).view(WAYS, -1)
        shares.append((asked @ matrix[:, :-1].T + matrix[:, -1]).softmax(1))
    return torch.stack(shares).mean(0).log()


def by_new_head(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """A head that is trained by torch's SGD on mini-batches of the support set, class by class."""
    order = y.argsort(stable=True)
    known, y = algorithm.backbone(x[order]).detach(), y[order]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = algorithm.new_head(WAYS).double()
        optimizer = torch.optim.SGD(head.parameters(), **algorithm.descent)
        for _ in range(algorithm.head_epochs):
            for rows in torch.randperm(len(y)).split(algorithm.head_batch):
                optimizer.zero_grad()
                each(known[rows], y[rows], head).backward()
                optimizer.step()
    return head(algorithm.backbone(queries)).detach()


def by_cosine(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    known, asked = algorithm.backbone(x), algorithm.backbone(queries)
    centres = [known[y == way].mean(0) for way in range(WAYS)]
    found = torch.stack([torch.cosine_similarity(asked, centre[None], dim=1) for centre in centres], 1)
    return (algorithm.temperature * found).detach()


def by_cnp(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    summary = torch.cat([algorithm.encoder(algorithm.backbone(x[y == way])).mean(0) for way in range(WAYS)])
    rows = [algorithm.decoder(torch.cat([query, summary])) for query in algorithm.backbone(queries)]
    return torch.stack(rows).detach()


def by_metanet(algorithm: Any, x: Tensor, y: Tensor, queries: Tensor) -> Any:
    """Fast weights of each item, read by each query by itself."""
    known, asked = algorithm.backbone(x).detach(), algorithm.backbone(queries).detach()

    def slopes(item: Tensor, label: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        first, second = (value.detach().clone().requires_grad_() for value in (first, second))
        loss = F.cross_entropy((second @ F.relu(first @ item))[None], label[None])
        return torch.autograd.grad(loss, (first, second))

    def seen(value: Tensor) -> Tensor:
        size = (value.abs() + torch.finfo(value.dtype).eps).log() / 7
        return torch.stack([size.clamp(min=-1), (value * np.exp(7.0)).clamp(-1, 1)], -1)

    pairs = list(zip(known, y, strict=True))
    of_keys = [slopes(item, label, algorithm.key.weight, algorithm.key_second)[0] for item, label in pairs]
    state: Any = None
    for way in range(WAYS):
        mean = torch.stack([slope for slope, label in zip(of_keys, y, strict=True) if label == way]).mean(0)
        state = algorithm.d(seen(mean).flatten(0, 1), state)
    fast_key = algorithm.d_output(state[0]).view(of_keys[0].shape)
    keys = [algorithm.key(item) + fast_key @ item for item in known]
    memory = []
    for item, label in pairs:
        both = slopes(item, label, algorithm.first.weight, algorithm.second.weight)
        memory.append([algorithm.m(seen(slope))[..., 0] for slope in both])
    rows = []
    for query in asked:
        key = algorithm.key(query) + fast_key @ query
        cosines = [key @ other / (key.square().sum() * other.square().sum() + 1e-6).sqrt() for other in keys]
        read = torch.stack(cosines).softmax(0)
        first, second = (sum(share * one[layer] for share, one in zip(read, memory, strict=True)) for layer in (0, 1))
        inner = F.relu(algorithm.first(query)) + F.relu(first @ query)
        rows.append(algorithm.second(inner) + second @ inner)
    return torch.stack(rows).detach()


REFERENCES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Any]] = {
    "fomaml": by_maml,
    "anil": by_head,
    "mtl": by_head,
    "boil": by_body,
    "metasgd": by_rates,
    "mamlplusplus": by_rates,
    "metacurvature": by_curvature,
    "imaml": by_imaml,
    "cavia": by_cavia,
    "hsml": by_hsml,
    "lstmlearner": by_lstm,
    "l2l": by_l2l,
    "reptile": by_reptile,
    "leo": by_leo,
    "relationnet": by_relation,
    "metaoptnet": by_svm,
    "rfs": by_logistic,
    "rfs_ensemble": by_logistic,
    "baseline": by_new_head,
    "baseline_plus_plus": by_new_head,
    "coral": by_new_head,
    "dann": by_new_head,
    "mmd": by_new_head,
    "multitask": by_new_head,
    "meta_baseline": by_cosine,
    "cnp": by_cnp,
    "metanet": by_metanet,
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", REFERENCES)
def test_each_item_counts_once_and_for_its_own_class(name: str, sizes: tuple[int, int]) -> None:
    algorithm = made(name)
    x, y, queries = task(sizes)
    found = Own(algorithm).predict(Batch(x, y, y), queries, WAYS).log_softmax(1)
    expected = REFERENCES[name](algorithm, x, y, queries).log_softmax(1)
    tolerance = 1e-5 if REFERENCES[name] is by_logistic else 1e-7
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_every_method_is_checked_here_or_there() -> None:
    known = set(REFERENCES).union(*ELSEWHERE.values())
    assert known == {name for name in choices("algo") if not name.startswith("learn2learn")}
