"""Pictures say that a machine made them, in XMP and, where there is a certificate, in a C2PA signature."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from PIL import Image

from hyperdreambooth.files import InputError
from hyperdreambooth.serve.config import ServeConfig
from hyperdreambooth.serve.marks import MEDIA, SOURCE_TYPE, check_certificate, encoded

PICTURE = Image.new("RGB", (48, 48), "red")


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_the_source_type_is_in_the_files_xmp(form: str) -> None:
    content = encoded(PICTURE, form, ServeConfig())
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.size == PICTURE.size
        assert SOURCE_TYPE in str(opened.info["xmp" if form == "jpeg" else "XML:com.adobe.xmp"])


@pytest.mark.parametrize("form", sorted(MEDIA))
def test_a_signed_picture_is_valid_and_says_how_it_was_made(form: str, tmp_path: Path) -> None:
    c2pa = pytest.importorskip("c2pa")
    config = ServeConfig(certificate=tmp_path / "chain.pem", private_key=tmp_path / "key.pem")
    certificates(tmp_path)
    check_certificate(config)
    content = encoded(PICTURE, form, config)
    with c2pa.Reader(MEDIA[form], io.BytesIO(content)) as reader:
        assert reader.get_validation_state() == "Valid" and SOURCE_TYPE in reader.json()
        assert json.loads(reader.json())["active_manifest"]
    Image.open(io.BytesIO(content)).load()


def test_a_certificate_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    config = ServeConfig(certificate=tmp_path / "chain.pem", private_key=tmp_path / "key.pem")
    with pytest.raises(InputError, match="No such file"):
        check_certificate(config)
    for name in ("chain.pem", "key.pem"):
        (tmp_path / name).write_text("nonsense")
    with pytest.raises(InputError, match="cannot sign"):
        check_certificate(config)


def certificates(home: Path) -> None:
    """Makes an authority and a certificate that may sign, for a day."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> x509.Name:
        parts = ((x509.NameOID.COMMON_NAME, text), (x509.NameOID.ORGANIZATION_NAME, "Test"))
        return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        made = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("authority"))
        made = made.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        return made.serial_number(x509.random_serial_number()).public_key(key.public_key())

    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
    signing = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
    leaf = builder("signer", own).add_extension(x509.BasicConstraints(False, None), True)
    leaf = leaf.add_extension(usage, True).add_extension(signing, False).add_extension(issuer, False)
    authority = builder("authority", root).add_extension(x509.BasicConstraints(True, None), True)
    chain = [leaf.sign(root, hashes.SHA256()), authority.sign(root, hashes.SHA256())]
    pem = serialization.Encoding.PEM
    (home / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
    (home / "key.pem").write_bytes(
        own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
