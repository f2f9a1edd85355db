"""The settings of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServeConfig(BaseModel):
    """The settings of `hdb serve`.

    Attributes:
        host: the address to listen on. Any but a loopback address needs API keys.
        port: the port; 0 for a free one.
        data: the folder of everything that the service keeps.
        database: the URL of a database as SQLAlchemy writes it; empty for a SQLite file in `data`.
        base: a pipeline folder or a hub id; None for the embedded avatars.
        hypernet: the hypernetwork of that base.
        dtype: the number format of the frozen base.
        finetune: further settings of the finetune, over those that the hypernetwork recommends.
        devices: a worker process runs on each; empty where the workers are started elsewhere.
        batch: the largest number of people who are trained, or of pictures that are drawn, side by side.
        likeness: whether a picture of each new person is drawn and compared with the photo.
        lease: the seconds after which a job of a silent worker is given to another one.
        attempts: how often a job is tried whose worker dies. From the third time on it is tried alone.
        most_waiting: the jobs that may wait; further ones are answered with 429.
        key_share: the share of them that may be the jobs of one API key; further ones are answered with 429.
        most_steps: the largest number of steps that a caller may ask for, in training and in drawing.
        most_pictures: the largest number of pictures of one request.
        most_pixels: the largest number of pixels of a drawn picture.
        photos: the largest number of photos of a person.
        body_bytes: the largest request in bytes.
        photo_side: photos are kept no larger than this, in pixels of the longer side.
        decode_bytes: the memory that decoding a photo may take, in bytes.
        decode_seconds: the seconds that decoding a photo may take.
        patience: the seconds in which a client has to send its request.
        connections: the connections that are served at a time; further ones are answered with 503.
        wait: the seconds for which a request for pictures is kept waiting before it is answered with a job.
        keep_hours: the hours for which pictures and ended jobs are kept.
        per_minute: the requests a minute of a caller where there are no keys.
        people: the people whom a caller may keep where there are no keys.
        webhook_hosts: `host` or `host:port` of receivers that may be reached by http or on private addresses.
        webhook_tries: how often a webhook is tried.
        content_filter: `module:function` of a content filter, see docs/serve.md.
        certificate: a PEM file with the certificates that sign pictures (C2PA); None for no signature.
        private_key: the PEM file of the key of `certificate`.
        signature: the algorithm of that key, as C2PA names it.
    """

    model_config = ConfigDict(extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    data: Path = Path("hdb-serve")
    database: str = ""
    base: str | None = None
    hypernet: str | None = None
    dtype: str = "float32"
    finetune: dict[str, Any] = Field(default_factory=dict[str, Any])
    devices: tuple[str, ...] = ("auto",)
    batch: int = Field(default=8, ge=1)
    likeness: bool = True
    lease: float = Field(default=30.0, gt=0)
    attempts: int = Field(default=5, ge=1)
    most_waiting: int = Field(default=1000, ge=1)
    key_share: float = Field(default=0.25, gt=0, le=1)
    most_steps: int = Field(default=200, ge=1)
    most_pictures: int = Field(default=10, ge=1)
    most_pixels: int = Field(default=2048 * 2048, ge=1)
    photos: int = Field(default=10, ge=1)
    body_bytes: int = Field(default=32_000_000, ge=1000)
    photo_side: int = Field(default=2048, ge=32)
    decode_bytes: int = Field(default=1_000_000_000, ge=1)
    decode_seconds: float = Field(default=20.0, gt=0)
    patience: float = Field(default=30.0, gt=0)
    connections: int = Field(default=200, ge=1)
    wait: float = Field(default=300.0, ge=0)
    keep_hours: float = Field(default=24.0, gt=0)
    per_minute: int = Field(default=600, ge=1)
    people: int = Field(default=10_000, ge=1)
    webhook_hosts: tuple[str, ...] = ()
    webhook_tries: int = Field(default=8, ge=1)
    content_filter: str = ""
    certificate: Path | None = None
    private_key: Path | None = None
    signature: str = "es256"

    @model_validator(mode="after")
    def _both(self) -> Self:
        """A signature needs a certificate and its key."""
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("expected certificate and private_key together; set both or none")
        return self

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite:///{(self.data / 'service.db').absolute()}"

    @property
    def waiting_of_a_key(self) -> int:
        """The jobs of one API key that may wait at a time."""
        return max(1, int(self.most_waiting * self.key_share))

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK
