"""diffusers and transformers without their annotations, which refuse arguments that they document."""

from __future__ import annotations

from typing import Any

import diffusers as typed_diffusers
import transformers as typed_transformers

diffusers: Any = typed_diffusers
transformers: Any = typed_transformers
