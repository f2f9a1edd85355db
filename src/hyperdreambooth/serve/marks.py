"""Pictures say that a machine made them: IPTC's digital source type in XMP, and a C2PA signature.

IPTC: cv.iptc.org/newscodes/digitalsourcetype. C2PA: c2pa.org/specifications, action `c2pa.created`.
"""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hyperdreambooth.files import InputError
from hyperdreambooth.serve.config import ServeConfig

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MEDIA = {"png": "image/png", "jpeg": "image/jpeg"}
_XMP = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"
 xmp:CreatorTool="hyperdreambooth"/></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


def encoded(picture: Image.Image, form: str, config: ServeConfig) -> bytes:
    """Returns a picture as a marked file, `png` or `jpeg`, signed where the service has a certificate."""
    file = io.BytesIO()
    if form == "png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", _XMP)
        picture.save(file, "PNG", pnginfo=info)
    else:
        picture.save(file, "JPEG", quality=95, subsampling=0, xmp=_XMP.encode())
    return _signed(file.getvalue(), MEDIA[form], config) if config.certificate else file.getvalue()


def check_certificate(config: ServeConfig) -> None:
    """Refuses a certificate that cannot sign, before anything is served.

    Raises:
        InputError: the package is not installed, a file is missing, or the two do not fit together.
    """
    if config.certificate is None:
        return
    try:
        _signed(encoded(Image.new("RGB", (32, 32)), "png", config.model_copy(update={"certificate": None})),
                MEDIA["png"], config)  # fmt: skip
    except ImportError:
        raise InputError("certificate: run pip install 'hyperdreambooth[c2pa]'") from None
    except OSError as error:
        raise InputError(f"certificate: {error.filename}: {error.strerror}") from None
    except Exception as error:  # the library has an exception of its own for every mistake
        raise InputError(f"certificate: cannot sign with it ({type(error).__name__}: {error})") from None


def _signed(content: bytes, media: str, config: ServeConfig) -> bytes:
    """Returns the file with a C2PA manifest that says how it was made."""
    from c2pa import Builder, C2paSignerInfo, Signer

    assert config.certificate is not None and config.private_key is not None
    action = {"action": "c2pa.created", "digitalSourceType": SOURCE_TYPE}
    manifest: dict[str, Any] = {
        "claim_generator_info": [{"name": "hyperdreambooth"}], "format": media, "title": "picture",
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }  # fmt: skip
    certificate, key = config.certificate.read_bytes(), config.private_key.read_bytes()
    made = io.BytesIO()
    info = C2paSignerInfo(config.signature, certificate, key, None)
    with Signer.from_info(info) as signer, Builder(json.dumps(manifest)) as builder:
        builder.sign(signer, media, io.BytesIO(content), made)
    return made.getvalue()
