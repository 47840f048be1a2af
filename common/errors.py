"""The exception tree of the project: every failure that a caller may want to tell apart.

    PdqError
    ├── InvalidRequest            the request itself is wrong; never retried
    │   ├── ContextLengthExceeded     prompt plus wanted tokens do not fit the model
    │   ├── TokenOutOfRange           a token id the vocabulary does not have
    │   └── NeverFits                 more blocks than the whole pool has
    ├── ConfigError               a setting is unknown, mistyped or contradicts another
    ├── ModelError                the model cannot be served
    │   ├── CheckpointError           a file or tensor is missing, corrupt or misshapen
    │   └── UnsupportedModel          an architecture, rope type or field we do not run
    ├── ResourceError             the machine cannot give what a setting asks for
    │   ├── OutOfBlocks               the pool has no free block just now
    │   └── InsufficientMemory        the pool or the model does not fit
    ├── ProtocolError             a peer sent something that cannot be accepted
    │   ├── MalformedMessage          wrong version, type, field, size or trailing bytes
    │   └── FingerprintMismatch       two ends that must agree do not; names the field
    ├── TransferError             a handoff failed; the attempt fails, not the process
    │   ├── DigestMismatch            a block's content is not what its hash promises
    │   ├── StaleBlock                a block was reused while it was being copied
    │   └── LinkLost                  the connection to the peer is gone
    │       └── TransportFailed           a transport raised what is no error of ours
    ├── EngineBroken              an engine computes nothing any more; another may do better
    ├── PoisonedRequest           computing this request makes engines fail, also when it is alone
    ├── NotHeld                   a node has nothing (any more) of what it is asked for
    ├── NotFiniteLogits           the model gave NaN or infinity, or every token was banned
    ├── TrainingFailed            a draft model in training has come to NaN or infinity
    ├── Overloaded                the service takes no further request now; retry later
    ├── RequestAborted            cancelled, timed out, or its owner is gone
    └── ServiceUnavailable        Redis or every node of a role is unreachable

`code` is stable: it goes into HTTP error bodies, metrics labels and logs. `param` names the field,
file or tensor that is at fault, when there is one. Both are bounded, so that no error carries back
the megabytes that a client sent.
"""

from __future__ import annotations

from typing import ClassVar

LONGEST_MESSAGE = 1_000  # characters
LONGEST_PARAM = 200


def shortened(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """`text`, or its two ends around the number of characters left out."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … [{len(text) - 2 * half} characters] … {text[-half:]}"


class PdqError(Exception):
    """Base of all errors; `code` is the stable label, `param` what it is about."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.message = shortened(message)
        self.param = None if param is None else shortened(param, LONGEST_PARAM)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class InvalidRequest(PdqError):
    code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class TokenOutOfRange(InvalidRequest):
    code = "token_out_of_range"


class NeverFits(InvalidRequest):
    code = "never_fits"


class ConfigError(PdqError):
    code = "config_error"


class ModelError(PdqError):
    code = "model_error"


class CheckpointError(ModelError):
    code = "checkpoint_error"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class ResourceError(PdqError):
    code = "resource_error"


class OutOfBlocks(ResourceError):
    code = "out_of_blocks"


class InsufficientMemory(ResourceError):
    code = "insufficient_memory"


class ProtocolError(PdqError):
    code = "protocol_error"


class MalformedMessage(ProtocolError):
    code = "malformed_message"


class FingerprintMismatch(ProtocolError):
    code = "fingerprint_mismatch"


class TransferError(PdqError):
    code = "transfer_error"


class DigestMismatch(TransferError):
    code = "digest_mismatch"


class StaleBlock(TransferError):
    code = "stale_block"


class LinkLost(TransferError):
    code = "link_lost"


class TransportFailed(LinkLost):
    code = "transport_failed"


class EngineBroken(PdqError):
    code = "engine_broken"


class PoisonedRequest(PdqError):
    code = "poisoned_request"


class NotHeld(PdqError):
    code = "not_held"


class NotFiniteLogits(PdqError):
    code = "no_token"


class TrainingFailed(PdqError):
    code = "training_failed"


class Overloaded(PdqError):
    code = "overloaded"


class RequestAborted(PdqError):
    code = "request_aborted"


class ServiceUnavailable(PdqError):
    code = "service_unavailable"


_BY_CODE = {
    error.code: error
    for error in tuple(globals().values())
    if isinstance(error, type) and issubclass(error, PdqError)
}


def from_code(code: str, message: str) -> PdqError:
    """The error with this code, as another process had it; a plain `PdqError` for an unknown code."""
    return _BY_CODE.get(code, PdqError)(message)
