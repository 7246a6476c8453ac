"""The work of ours.py in PyTorch, written as its users write it, and by curvlinops. Run by timing.py in a process of
its own; neither package is needed by anything else here."""

# pyright: reportMissingImports=false
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timing import Rows, Sizes, Work, serve
from torch import Tensor, nn

CLASSES = 10  # of a task
ADAPTED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


# -- the model, its weights named as timm names them -----------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # PyTorch's fused kernel has no second derivatives
            x = ((q / q.shape[-1] ** 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads, fused), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Images NCHW in, logits out."""

    def __init__(self, net: Sequence[int], classes: int, fused: bool = True):
        super().__init__()
        image, patch, width, depth, heads = net
        self.patch_embed = Patches(patch, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, fused) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(sizes: Sizes, images: int | None = None, *, fused: bool = True, large: bool = False, classes: int = 0):
    """(model, images, labels)."""
    torch.manual_seed(0)
    net, classes, count = sizes.large if large else sizes.net, classes or sizes.classes, images or sizes.batch
    return ViT(net, classes, fused), torch.randn(count, 3, net[0], net[0]), torch.arange(count) % classes


def dense(model: nn.Module) -> list[nn.Linear]:
    """The layers that adapters change."""
    return [layer for name, layer in model.named_modules() if name.endswith(ADAPTED)]


# -- passes and products ---------------------------------------------------------------------------------------------
def forward(sizes: Sizes, images: int | None = None) -> Work:
    model, x, _ = vit(sizes, images)
    return torch.no_grad()(lambda: model(x))


def gradient(sizes: Sizes, images: int | None = None, large: bool = False) -> Work:
    model, x, y = vit(sizes, images, large=large)
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def product(sizes: Sizes, name: str, vectors: int = 0) -> Work:
    """Of the curvlinops operator of this name with a vector, or with several at once."""
    import curvlinops

    model, x, y = vit(sizes, fused=False)
    params = list(model.parameters())
    operator = getattr(curvlinops, name)(model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False)
    vector = [p.detach().clone() for p in params]
    if vectors:
        vector = [torch.stack([v] * vectors, -1) for v in vector]
    return lambda: operator @ vector


def kfac(sizes: Sizes) -> Work:
    from curvlinops import KFACLinearOperator

    model, x, y = vit(sizes, sizes.kfac_images, fused=False)
    weights = [layer.weight for layer in dense(model)]
    data = list(zip(x.split(sizes.batch), y.split(sizes.batch), strict=True))  # as fast as one batch, and smaller
    options = {"check_deterministic": False, "fisher_type": "mc"}
    factors = partial(KFACLinearOperator, model, nn.CrossEntropyLoss(), weights, data, **options)
    return lambda: factors().compute_kronecker_factors()


def fisher_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """`Σ_n Σ_c p_c (∂ log p_c / ∂W)²` of the dense layers: a backward pass a class, squared image by image."""
    layers, inputs, outputs = dense(model), [], []

    def keep(_, given, output):
        inputs.append(given[0].detach())
        outputs.append(output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    log_p = model(images).log_softmax(-1)
    for hook in hooks:
        hook.remove()
    totals = [torch.zeros_like(layer.weight) for layer in layers]
    for c in range(log_p.shape[1]):
        back = torch.autograd.grad(log_p[:, c].sum(), outputs, retain_graph=True)
        share = log_p[:, c].detach().exp()
        for total, given, gradient in zip(totals, inputs, back, strict=True):
            for image, weight in enumerate(share):
                total.addcmul_(own := gradient[image].T @ given[image], weight * own)
    return totals


def fisher(sizes: Sizes) -> Work:
    model, x, _ = vit(sizes, sizes.fisher_images)
    return lambda: fisher_of(model, x)


# -- modules: the way of the reference implementation of Porrello et al. (2025) ----------------------------------------
class Change(nn.Module):
    """What a module changes in a dense layer, by its numbers: `lora`, `ia3` or `full`."""

    def __init__(self, kind: str, layer: nn.Linear, rank: int):
        super().__init__()
        self.kind, self.weight = kind, [layer.weight.detach()]  # in a list it is no parameter of this one
        out, fan_in = layer.weight.shape
        rank *= 3 if out == 3 * fan_in else 1  # a joint qkv
        starts = {
            "lora": lambda: {"a": (2 * torch.rand(rank, fan_in) - 1) / fan_in**0.5, "b": torch.zeros(out, rank)},
            "ia3": lambda: {"scale": torch.ones(out)},
            "full": lambda: {"delta": torch.zeros(out, fan_in)},
        }
        for name, start in starts[kind]().items():
            setattr(self, name, nn.Parameter(start))

    def forward(self) -> Tensor:
        if self.kind == "lora":
            return self.b @ self.a
        return self.weight[0] * (self.scale - 1)[:, None] if self.kind == "ia3" else self.delta

    def pulled(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradients of the numbers, of that in the change."""
        if self.kind == "lora":
            return {"a": self.b.T @ gradient, "b": gradient @ self.a.T}
        return {"scale": (gradient * self.weight[0]).sum(1)} if self.kind == "ia3" else {"delta": gradient}


class Adapted(nn.Module):
    """A frozen dense layer with modules: `W x + share Σ_s Δ_s x`, each a term of its own in every pass, as the
    reference has it, or all summed into the weight first. The last one is trained, and always is in the weight."""

    def __init__(
        self, layer: nn.Linear, kind: str, rank: int, modules: int = 1, ensemble: bool = False, summed: bool = False
    ):
        super().__init__()
        self.summed = summed
        self.layer, self.ensemble, self.share = layer.requires_grad_(False), ensemble, 1 / modules if ensemble else 1.0
        self.past = nn.ModuleList(Change(kind, layer, rank).requires_grad_(False) for _ in range(modules - 1))
        self.own = Change(kind, layer, rank)
        self.fisher = 1e-3 * torch.rand_like(layer.weight)
        self.past_sum = sum((change().detach() for change in self.past), torch.zeros_like(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight + self.share * self.own()
        if self.summed:
            return F.linear(x, sum((self.share * change() for change in self.past), weight), self.layer.bias)
        y = F.linear(x, weight, self.layer.bias)
        for change in self.past:
            y = y + F.linear(x, self.share * change())
        return y

    def penalty(self, weight: float) -> Tensor:
        """The gradient of ITA's penalty, or of IEL's, in the change."""
        if not self.ensemble:
            return weight * self.fisher * self.own()
        if not self.past:
            return weight / 2 * self.fisher * self.own()
        return weight * self.fisher * ((1 - self.share) * self.own() - self.share * self.past_sum)


class Factored(nn.Module):
    """A frozen dense layer with LoRA as it is mostly done: `W x + B (A x)`."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer, self.own = layer.requires_grad_(False), Change("lora", layer, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.own.a), self.own.b)


def replaced(model: ViT, make: Callable[[nn.Linear], nn.Module]) -> list[nn.Module]:
    """The model's dense layers as `make` makes them; all but these and the head is frozen."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    made = []
    for block in model.blocks:
        for name in ADAPTED:
            part, leaf = name.split(".")
            layer = make(getattr(getattr(block, part), leaf))
            setattr(getattr(block, part), leaf, layer)
            made.append(layer)
    return made


@torch.no_grad()
def penalise(layers: Sequence[Adapted], weight: float, coupled: bool) -> None:
    """ITA's or IEL's step: added to the gradients, or one of its own, every tensor of it clipped at 100."""
    for layer in layers:
        for name, gradient in layer.own.pulled(layer.penalty(weight)).items():
            number = getattr(layer.own, name)
            if coupled:
                number.grad += gradient
            else:
                number -= gradient * torch.clamp(100 / gradient.norm(), max=1)


@torch.no_grad()
def pull(head: nn.Linear, reference: Sequence[Tensor], fisher: Sequence[Tensor], coupled: bool) -> None:
    """The step that pulls the head to its reference."""
    for number, start, metric in zip(head.parameters(), reference, fisher, strict=True):
        gradient = 2 * (0.025 * metric + 0.001) * (number - start)
        if coupled:
            number.grad += gradient
        else:
            number -= gradient * torch.clamp(100 / gradient.norm(), max=1)


def step(sizes: Sizes, kind: str, modules: int = 1, ensemble: bool = False, summed: bool = False) -> Work:
    model, x, y = vit(sizes, classes=CLASSES)
    layers = replaced(model, lambda layer: Adapted(layer, kind, sizes.rank, modules, ensemble, summed))
    trained, coupled = [p for p in model.parameters() if p.requires_grad], kind == "full"
    optimizer = torch.optim.AdamW(trained, 3e-4, weight_decay=0)
    reference = [p.detach().clone() for p in model.head.parameters()]
    metric = [1e-3 * torch.rand_like(p) for p in reference]

    def once():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        penalise(layers, 20.0 if ensemble else 0.02, coupled)
        pull(model.head, reference, metric, coupled)
        if coupled:
            nn.utils.clip_grad_norm_(trained, 100)
        optimizer.step()

    return once


def lora(sizes: Sizes) -> Work:
    model, x, y = vit(sizes, classes=CLASSES)
    replaced(model, lambda layer: Factored(layer, sizes.rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-4, weight_decay=0)

    def once():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return once


def composed(sizes: Sizes) -> Work:
    """Every module's change is made and applied in every pass."""
    model, x, _ = vit(sizes)
    replaced(model, lambda layer: Adapted(layer, "lora", sizes.rank, sizes.composed, True))
    return torch.no_grad()(lambda: model(x))


# -- the modular network: a loop over tasks ----------------------------------------------------------------------------
class Modular(nn.Module):
    """As `compo_jax.modular.ModularNet` of basic blocks: each task its own mixture of the templates at each layer."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        tasks, layers, templates, width = sizes.tasks, sizes.layers, sizes.templates, sizes.channels
        self.patch = sizes.net[1]
        he = lambda *shape: nn.Parameter(torch.randn(*shape) * (2 / shape[-1] ** 2 / shape[-3]) ** 0.5)
        self.stem = he(width, 3, self.patch, self.patch)
        self.conv = nn.ParameterList(he(templates, width, width, 3, 3) for _ in range(2))
        self.route = nn.Parameter(0.01 * torch.randn(tasks, layers, templates))
        self.norm = nn.ParameterDict()
        for name, shape in {"stem": (tasks, width), "1": (tasks, layers, width), "2": (tasks, layers, width)}.items():
            self.norm[f"{name}_scale"] = nn.Parameter(torch.ones(shape))
            self.norm[f"{name}_bias"] = nn.Parameter(torch.zeros(shape))
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(tasks))

    def normalised(self, x: Tensor, name: str, *where: int) -> Tensor:
        scale, bias = self.norm[f"{name}_scale"][where], self.norm[f"{name}_bias"][where]
        return F.batch_norm(x, None, None, scale, bias, training=True)

    def task(self, t: int, images: Tensor, weights: Tensor) -> Tensor:
        x = F.relu(self.normalised(F.conv2d(images, self.stem, stride=self.patch), "stem", t))
        for layer, mixture in enumerate(weights):
            first, second = (torch.tensordot(mixture, templates, 1) for templates in self.conv)
            y = F.relu(self.normalised(F.conv2d(x, first, padding=1), "1", t, layer))
            x = F.relu(x + self.normalised(F.conv2d(y, second, padding=1), "2", t, layer))
        return self.heads[t](x.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        """Of images (tasks, batch, channels, height, width) the logits (tasks, batch, classes)."""
        weights = self.route.softmax(-1)
        return torch.stack([self.task(t, x, weights[t]) for t, x in enumerate(images)])


def modular_loss(model: Modular, images: Tensor, labels: Tensor) -> Tensor:
    """At the first step of a training, where routes needn't be sharp yet."""
    used = model.route.softmax(-1).mean((0, 1))
    waste = 1 + (used * used.log()).sum() / torch.log(torch.tensor(float(len(used))))
    return F.cross_entropy(model(images).flatten(0, 1), labels.flatten()) + 0.01 * waste


def multitask(sizes: Sizes) -> Work:
    torch.manual_seed(0)
    model, side = Modular(sizes), sizes.net[0]
    images = torch.randn(sizes.tasks, sizes.task_batch, 3, side, side)
    labels = torch.arange(sizes.tasks * sizes.task_batch).reshape(sizes.tasks, -1) % CLASSES
    groups = [
        {"params": [model.route], "lr": 1e-2, "weight_decay": 0},
        {"params": list(model.norm.values()), "weight_decay": 0},
        {"params": [model.stem, *model.conv, *model.heads.parameters()], "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-3)

    def once():
        optimizer.zero_grad()
        modular_loss(model, images, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return once


ROWS: Rows = {
    "forward": forward,
    "gradient": gradient,
    "large-gradient": lambda sizes: gradient(sizes, sizes.large_batch, large=True),
    "hvp": partial(product, name="HessianLinearOperator"),
    "hvp8": partial(product, name="HessianLinearOperator", vectors=8),
    "ggn": partial(product, name="GGNLinearOperator"),
    "lora": lora,
    "ita-lora": partial(step, kind="lora"),
    "ita-ia3": partial(step, kind="ia3"),
    "ita-full": partial(step, kind="full"),
    "iel-1": partial(step, kind="lora", modules=1, ensemble=True),
    "iel-5": partial(step, kind="lora", modules=5, ensemble=True),
    "iel-20": partial(step, kind="lora", modules=20, ensemble=True),
    "iel-20-summed": partial(step, kind="lora", modules=20, ensemble=True, summed=True),
    "evaluation": lambda sizes: forward(sizes, sizes.eval_batch),
    "composed": composed,
    "fisher": fisher,
    "kfac": kfac,
    "multitask": multitask,
}

if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(ROWS)
