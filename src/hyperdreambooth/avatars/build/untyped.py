"""diffusers and transformers as `Any`: their annotations reject arguments that their documentation has."""

from __future__ import annotations

from typing import Any

import diffusers as typed_diffusers
import transformers as typed_transformers

diffusers: Any = typed_diffusers
transformers: Any = typed_transformers
