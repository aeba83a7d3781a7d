//! A trust store for Java: the PKCS #12 file (RFC 7292) of certificates without any encryption or checksum, which Java
//! reads without a password. Java's own store has had this form since version 18. Pure.
//!
//! ```text
//! PFX: version 3, contents: [ contents: [ bag, bag, ... ] ]
//! bag: certificate, attributes: { the certificate is trusted for every purpose }
//! ```

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OCTET_STRING: u8 = 0x04;
/// Tag of the explicit element number 0.
const EXPLICIT: u8 = 0xa0;

/// Version 3, as an encoded integer.
const VERSION: &[u8] = &[0x02, 1, 3];
/// Encoded object identifiers: `data` (1.2.840.113549.1.7.1), `certBag` (1.2.840.113549.1.12.10.1.3),
/// `x509Certificate` (1.2.840.113549.1.9.22.1), Java's `trustedKeyUsage` (2.16.840.1.113894.746875.1.1) and
/// `anyExtendedKeyUsage` (2.5.29.37.0).
const DATA: &[u8] = &[0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 1];
const CERTIFICATE_BAG: &[u8] = &[0x06, 11, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 12, 10, 1, 3];
const X509_CERTIFICATE: &[u8] = &[0x06, 10, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 22, 1];
const TRUSTED_USAGE: &[u8] = &[0x06, 12, 0x60, 0x86, 0x48, 1, 0x86, 0xf9, 0x66, 0xad, 0xca, 0x7b, 1, 1];
const ANY_USAGE: &[u8] = &[0x06, 4, 0x55, 0x1d, 0x25, 0];

/// Returns the trust store of certificates in DER.
pub(super) fn trust_store(certificates: &[Vec<u8>]) -> Vec<u8> {
    let bags: Vec<u8> = certificates.iter().flat_map(|certificate| bag(certificate)).collect();
    let contents = content(&element(SEQUENCE, &bags));
    let contents = content(&element(SEQUENCE, &contents));
    element(SEQUENCE, &[VERSION, &contents].concat())
}

/// Returns a bag with one trusted certificate.
fn bag(certificate: &[u8]) -> Vec<u8> {
    let value = element(EXPLICIT, &element(OCTET_STRING, certificate));
    let certificate = element(SEQUENCE, &[X509_CERTIFICATE, &value].concat());
    let usage = element(SEQUENCE, &[TRUSTED_USAGE, &element(SET, ANY_USAGE)].concat());
    let value = element(EXPLICIT, &certificate);
    element(SEQUENCE, &[CERTIFICATE_BAG, &value, &element(SET, &usage)].concat())
}

/// Returns contents that are not encrypted.
fn content(data: &[u8]) -> Vec<u8> {
    element(SEQUENCE, &[DATA, &element(EXPLICIT, &element(OCTET_STRING, data))].concat())
}

/// Returns an element in DER: tag, length and contents.
fn element(tag: u8, contents: &[u8]) -> Vec<u8> {
    let length = contents.len().to_be_bytes();
    let first = length.iter().position(|&byte| byte != 0).unwrap_or(length.len() - 1);
    let length = &length[first..];
    let mut element = vec![tag];
    if contents.len() >= 0x80 {
        // A length of more than seven bits follows the number of its bytes, of which there are at most eight.
        element.push(0x80 | u8::try_from(length.len()).unwrap_or(0));
    }
    element.extend(length);
    element.extend(contents);
    element
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_have_as_few_bytes_as_they_need() {
        for (length, head) in [
            (0, &[4, 0][..]),
            (127, &[4, 127]),
            (128, &[4, 0x81, 128]),
            (255, &[4, 0x81, 255]),
            (256, &[4, 0x82, 1, 0]),
            (70_000, &[4, 0x83, 1, 0x11, 0x70]),
        ] {
            let element = element(OCTET_STRING, &vec![7; length]);
            assert_eq!(&element[..head.len()], head, "{length}");
            assert_eq!(element.len(), head.len() + length, "{length}");
        }
    }

    /// The bytes are those that `keytool` of Java 17 lists as one trusted certificate, but for the certificate.
    #[test]
    fn a_store_of_one_certificate_has_the_layout_of_the_standard() {
        let bag =
            [CERTIFICATE_BAG, &[0xa0, 21, 0x30, 19], X509_CERTIFICATE, &[0xa0, 5, 4, 3], b"DER"].concat();
        let trusted = [&[0x31, 24, 0x30, 22][..], TRUSTED_USAGE, &[0x31, 6], ANY_USAGE].concat();
        let bags = [&[0x30, 64, 0x30, 62], &bag[..], &trusted].concat();
        let inner = [&[0x30, 83, 0x30, 81], DATA, &[0xa0, 68, 4, 66], &bags[..]].concat();
        let outer = [&[0x30, 105, 2, 1, 3, 0x30, 100], DATA, &[0xa0, 87, 4, 85], &inner[..]].concat();
        assert_eq!(trust_store(&[b"DER".to_vec()]), outer);
    }
}
