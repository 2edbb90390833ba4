"""What a pool is made from (`PrepareSpec`) and what a finished one says of itself (`PoolInfo`)."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ssl_diversity import files
from ssl_diversity.config import Config

FORMAT = 2  # of a pool's folder; raised when older code could no longer read it

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Codec = Literal["png", "jpeg", "original"]  # original: the bytes as the source has them
Resize = Literal["square", "short", "none"]
Split = Literal["train", "test", "all"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class PrepareSpec(Config):
    """Everything that determines a pool's rows and their encoding; `directory` is where the pool lies."""

    source: str  # a kind of ssl_diversity.data.sources
    options: dict[str, Any] = Field({})  # the kind's own options
    name: str = Field(pattern=NAME)
    split: Split = "train"
    holdout: float | None = Field(
        None, ge=0, lt=1
    )  # test share of a set without splits; None: as the kind says
    resize: Resize = "square"  # square: short side to `size`, then the centre; short: only the first; none
    size: int = Field(64, gt=0)  # pixels; `short` never enlarges; not used by `none`
    filter: Filter = "bicubic"
    codec: Codec = "png"
    quality: int = Field(95, ge=1, le=100)  # of JPEG
    seed: int = Field(0, ge=0, lt=1 << 64)  # of the pool's order
    exclude: tuple[str, ...] = ()  # sets whose test images must not be in the pool
    deduplicate: bool = True
    near_duplicates: bool = False  # drop near copies too, and keep what finds them (data/near.py)
    max_images: int | None = Field(None, gt=0)
    shard_bytes: int = Field(1 << 28, gt=0)
    labels_required: bool = False  # refuse an unlabelled source
    origin: str = ""
    terms: str = ""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {"name", "shard_bytes", "labels_required", "origin", "terms"}
    )

    @model_validator(mode="after")
    def _original(self) -> "PrepareSpec":
        if self.codec == "original" and self.resize != "none":
            raise ValueError("codec=original keeps the bytes as they are; say resize=none with it")
        return self

    def identity(self) -> dict[str, Any]:
        """Without what only says how files are fetched."""
        found = super().identity()
        options = {key: value for key, value in found["options"].items() if key != "download"}
        return {**found, "options": options}

    @property
    def digest(self) -> str:
        return files.digest(self.identity())

    @property
    def directory(self) -> Path:
        return files.pools_dir() / f"{self.name}-{self.digest[:8]}"


class Shard(Config):
    """One tar of a pool; `chained` is the digest of all rows (content hash, label) up to its end."""

    file: str
    blake2b: str
    bytes: int
    rows: int
    chained: str


class PoolInfo(Config):
    """pool.json."""

    format: int = FORMAT
    name: str
    source: str
    spec: dict[str, Any]
    spec_digest: str
    size: int
    first_size: int  # rows when the pool was first written: replicates start by it
    counts: dict[str, int]  # read = undecodable + duplicate + ... + kept; conflict: copies with another label
    classes: list[str]
    resize: Resize = "square"
    image_size: int  # pixels: side of the square, least short side (resize=short), or 0 (resize=none)
    filter: str
    codec: str
    quality: int
    seed: int
    origin: str = ""
    terms: str = ""
    source_digest: str  # of all (name, label, content) read, in any order
    shards: list[Shard]
    files: dict[str, str]  # blake2b of the index columns and of dropped.jsonl
    near_duplicates: bool = False  # the index has `signature` and `thumbnail`
    real_images: int | None  # behind the pool: kept, or what its generator was trained on; None: not known
    provenance: dict[str, Any] = Field({})

    @property
    def encoding(self) -> dict[str, Any]:
        """What, with the content hashes, determines every pixel that a reader sees."""
        quality = self.quality if self.codec == "jpeg" else None
        return {
            "resize": self.resize,
            "size": self.image_size,
            "filter": self.filter,
            "codec": self.codec,
            "quality": quality,
        }

    @property
    def digest(self) -> str:
        """Of the whole pool: encoding, classes, and every row's content and label in order."""
        return files.digest(
            {"encoding": self.encoding, "classes": self.classes, "rows": self.shards[-1].chained}
        )
