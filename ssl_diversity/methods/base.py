"""What the methods share: views in, schedules, the optimiser, a teacher, and what is evaluated in the end.

A step of any method is `criterion(*forward(views, positions))`. Everything random in it is a function of
(seed, position); everything scheduled a function of `samples_seen` over the budget. So a state dict and an
optimiser state are all that a resumed run needs.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssl_diversity import collectives
from ssl_diversity.backbones import build_backbone, is_vit, patch_size
from ssl_diversity.errors import UserError
from ssl_diversity.methods.optim import LARS
from ssl_diversity.methods.recipe import LR_BATCH, Recipe
from ssl_diversity.methods.schedules import cosine, warmup_cosine
from ssl_diversity.networks import DropPathKey, ViT
from ssl_diversity.views.augment import make_views


class Method(pl.LightningModule):
    """A self-supervised method on a backbone; subclasses define `build`, `forward` and `criterion`.

    A batch is {"images": uint8 (B, 3, H, W), "positions": int64 (B,)}, positions being the samples' places in
    the run's order. `last_loss` is the latest step's loss (float32 scalar on the device, detached). With several
    ranks B is a rank's share of `batch_size`, and the mean of the ranks' losses is the loss.
    """

    view_counts = range(2, 3)
    """How many views the method takes."""
    joint_embedding = True
    """Whether the first output of `forward` embeds images, so that equal outputs for all mean collapse."""
    mean_over_samples = False
    """Whether the loss is a mean of losses of single samples. If not, ranks gather what `forward` gives, (B, d) each."""
    last_loss: Tensor
    compiled = False
    """Whether torch.compile has its networks, as `compiling.compile_networks` sets it."""

    def __init__(
        self, *, backbone: str, image_size: int, recipe: Recipe, budget: int, batch_size: int, seed: int
    ) -> None:
        super().__init__()
        _check_views(backbone, image_size, recipe, self.view_counts)
        self.backbone_name, self.image_size, self.recipe = backbone, image_size, recipe
        self.budget, self.batch_size, self.seed = budget, batch_size, seed
        self.samples_seen = 0
        self.followers: list[tuple[nn.Module, nn.Module]] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.backbone = build_backbone(backbone, image_size, drop_path=recipe.drop_path)
            self.dim = cast(int, self.backbone.dim)
            self.build(**recipe.params)
        self.to(memory_format=torch.channels_last)

    # What a method defines

    build: Callable[..., None]
    """Creates heads and teachers; its keyword arguments are the recipe's `params`."""

    def forward(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        """What the loss needs, from views (each float32 (B, 3, s, s)) of the samples at `positions`."""
        raise NotImplementedError

    def criterion(self, *outputs: Tensor) -> Tensor:
        """The loss of `forward`'s outputs (in float32), a scalar."""
        raise NotImplementedError

    @property
    def pooling(self) -> str:
        """How to read features from the evaluated backbone: "cls", "tokens" (ViT) or "pool"."""
        return "cls" if is_vit(self.backbone_name) else "pool"

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated, loadable into `build_backbone(name, image_size)`."""
        return self.backbone

    def before_update(self) -> None:
        """Called between backward and the optimiser's step."""

    # What a method uses

    def embed(self, network: nn.Module, views: list[Tensor], positions: Tensor) -> Tensor:
        """Features (V * B, dim) of V views, view-major; neighbours of one size are one stacked forward."""
        features, first = [], 0
        for _, group in itertools.groupby(views, key=lambda view: view.shape[-1]):
            stack = list(group)
            self.key_drop_path(network, positions, first)
            features.append(network(torch.cat(stack).contiguous(memory_format=torch.channels_last)))
            first += len(stack)
        return torch.cat(features)

    def key_drop_path(self, network: nn.Module, positions: Tensor, first: int = 0) -> None:
        """Tell a ViT that its next forward holds views `first` and on of the samples at `positions`."""
        if isinstance(network, ViT):
            network.key_drop_path(DropPathKey(self.seed, positions, first))

    def follow(self, student: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
        """A teacher for `student`: equal at first, without gradient, its exponential moving average from then on."""
        teacher = make().requires_grad_(False)
        teacher.load_state_dict(student.state_dict())
        self.followers.append((student, teacher))
        return teacher

    def make_teacher_backbone(self) -> nn.Module:
        """A backbone without drop path."""
        return build_backbone(self.backbone_name, self.image_size)

    @property
    def progress(self) -> float:
        """Fraction of the budget seen at the middle of the current step."""
        return (self.samples_seen + self.batch_size / 2) / self.budget

    # Training

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        views = make_views(batch["images"], self.recipe.views, self.seed, batch["positions"])
        loss = self.loss_of(views, batch["positions"])
        self.last_loss = loss.detach()
        return loss

    def loss_of(self, views: list[Tensor], positions: Tensor) -> Tensor:
        """`criterion(*forward(views, positions))`, the loss in float32 under any autocast."""
        return self.loss_from(self.outputs_of(views, positions))

    def outputs_of(self, views: list[Tensor], positions: Tensor) -> tuple[Tensor, ...]:
        """`forward`, with the attention that trains fastest on this device."""
        # Fused attention's backward is slow on a CPU: with it, a step of MAE on vit-micro took 1.9 times as long.
        plain_attention = (
            sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else contextlib.nullcontext()
        )
        with plain_attention:
            return self.forward(views, positions)

    def loss_from(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """`criterion` of `outputs_of`, in float32, over the batches of all ranks where it is no mean over samples."""
        with torch.autocast(self.device.type, enabled=False):
            outputs = tuple(output.float() for output in outputs)
            return self.criterion(*(outputs if self.mean_over_samples else collectives.global_batch(outputs)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser; parameters of one dimension (biases, norms) form the second, undecayed group."""
        recipe, params = self.recipe, [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        lr = self.learning_rate()
        if recipe.optimizer == "adamw":
            return torch.optim.AdamW(
                groups, lr=lr, betas=cast("tuple[float, float]", recipe.betas), fused=True
            )
        if recipe.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=cast(float, recipe.momentum), foreach=True)
        groups[0] |= {"eta": recipe.lars_eta, "clip": recipe.lars_clip}
        return LARS(groups, lr=lr, momentum=cast(float, recipe.momentum))

    def learning_rate(self) -> float:
        """Of the current step. The one place where `lr` is scaled by the batch size."""
        peak = self.recipe.lr * self.batch_size / LR_BATCH
        return warmup_cosine(peak, peak * self.recipe.final_lr, self.progress, self.recipe.warmup_fraction)

    def weight_decay(self) -> float:
        """Of the current step."""
        end = self.recipe.weight_decay_end
        return (
            self.recipe.weight_decay if end is None else cosine(self.recipe.weight_decay, end, self.progress)
        )

    def ema_rate(self) -> float:
        """The teachers' decay in the current step."""
        assert self.recipe.ema is not None, f"{self.recipe.method} needs `ema` in its recipe"
        return self.recipe.ema.rate(self.progress, self.batch_size, self.budget)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One whole step: schedules, the closure (forward and backward), update, teachers, `samples_seen`.

        Lightning calls it; a loop of one's own calls it with a closure too. Afterwards the module's and the
        optimiser's states are those of the step's end, so any later moment is a good one for a checkpoint.
        """
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        groups[0]["weight_decay"] = self.weight_decay()
        for group in groups:
            group["lr"] = self.learning_rate()

        def closure() -> Any:
            loss = cast("Callable[[], Any]", optimizer_closure)()
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.recipe.clip_norm)
            self.before_update()
            return loss

        optimizer.step(closure=closure)
        self.update_teachers()
        self.samples_seen += self.batch_size

    def update_teachers(self) -> None:
        """Move every teacher towards its student by the current step's rate."""
        for student, teacher in self.followers:
            update_momentum(student, teacher, self.ema_rate())

    # State

    def evaluation_state(self) -> tuple[str, dict[str, Tensor]]:
        """(pooling, state dict) of the network that is evaluated."""
        return self.pooling, {key: value.detach() for key, value in self.evaluated.state_dict().items()}

    def get_extra_state(self) -> dict[str, int]:
        return {"samples_seen": self.samples_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.samples_seen = state["samples_seen"]


def _check_views(backbone: str, image_size: int, recipe: Recipe, counts: range) -> None:
    """As many views as the method takes, each made of whole patches where the backbone is a ViT."""
    where, count = f"recipe {recipe.method}/{recipe.name}: views", sum(view.count for view in recipe.views)
    if count not in counts:
        wanted = str(counts[0]) if len(counts) == 1 else f"at least {counts[0]}"
        raise UserError(
            f"{where}: {recipe.method} takes {wanted}, not {count}; change the list or its counts"
        )
    patch = patch_size(image_size) if is_vit(backbone) else 1
    for side in {view.pixels(image_size) for view in recipe.views}:
        if side % patch:
            raise UserError(
                f"{where}: {side} px (of images of {image_size} px) are not whole patches of {patch} px of {backbone}; "
                "change the view's size"
            )
