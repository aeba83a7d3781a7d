//! The certificates of a bundle, decoded. Pure.
//!
//! Guarantees: any bytes are read without an error, and what is no certificate in PEM (RFC 7468) is left out.

const BEGIN: &[u8] = b"-----BEGIN CERTIFICATE-----";
const END: &[u8] = b"-----END CERTIFICATE-----";

/// Returns the certificates of a bundle in DER, in their order.
pub(super) fn certificates(bundle: &[u8]) -> Vec<Vec<u8>> {
    let (mut found, mut encoded) = (Vec::new(), None::<Vec<u8>>);
    for line in bundle.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii) {
        if line == BEGIN {
            encoded = Some(Vec::new());
        } else if line == END {
            found.extend(encoded.take().as_deref().and_then(decode));
        } else if let Some(encoded) = &mut encoded {
            encoded.extend(line);
        }
    }
    found
}

/// Decodes Base64 (RFC 4648, section 4) without white space. Returns `None` for anything else, or nothing.
fn decode(encoded: &[u8]) -> Option<Vec<u8>> {
    let padding = encoded.iter().rev().take_while(|&&byte| byte == b'=').count();
    if encoded.is_empty() || !encoded.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut decoded = Vec::with_capacity(encoded.len() / 4 * 3);
    for (at, four) in encoded.chunks_exact(4).enumerate() {
        let is_last = (at + 1) * 4 == encoded.len();
        let mut bits = 0u32;
        for (index, &letter) in four.iter().enumerate() {
            let is_padding = is_last && index >= 4 - padding;
            bits = bits << 6 | if is_padding { 0 } else { sextet(letter)? };
        }
        decoded.extend(&bits.to_be_bytes()[1..]);
    }
    decoded.truncate(decoded.len() - padding);
    Some(decoded)
}

fn sextet(letter: u8) -> Option<u32> {
    let value = match letter {
        b'A'..=b'Z' => letter - b'A',
        b'a'..=b'z' => letter - b'a' + 26,
        b'0'..=b'9' => letter - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(value.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop, proptest};

    use super::*;

    fn pem(encoded: &str) -> String {
        format!("-----BEGIN CERTIFICATE-----\n{encoded}\n-----END CERTIFICATE-----\n")
    }

    #[test]
    fn the_examples_of_the_standard_are_decoded() {
        for (encoded, decoded) in [
            ("Zg==", Some("f")),
            ("Zm8=", Some("fo")),
            ("Zm9v", Some("foo")),
            ("Zm9vYmFy", Some("foobar")),
            ("", None),
            ("Zg=", None),
            ("Z===", None),
            ("Zg==Zg==", None),
            ("Z=g=", None),
            ("Zm9\u{e9}", None),
        ] {
            assert_eq!(decode(encoded.as_bytes()).as_deref(), decoded.map(str::as_bytes), "{encoded:?}");
        }
    }

    #[test]
    fn certificates_are_found_among_comments_and_other_blocks() {
        let key = pem("Zm9v").replace("CERTIFICATE", "PRIVATE KEY");
        let trusted = pem("Zm9v").replace("CERTIFICATE", "TRUSTED CERTIFICATE");
        let bundle = format!(
            "# one\r\n{}{key}{trusted}{}{}",
            pem("Zm9v\r\nYmFy").replace('\n', "\r\n"),
            pem("!"),
            pem("Zg==")
        );
        assert_eq!(certificates(bundle.as_bytes()), [b"foobar".to_vec(), b"f".to_vec()]);
        let cut =
            "-----BEGIN CERTIFICATE-----\nZg==\n-----BEGIN CERTIFICATE-----\nZm9v\n-----END CERTIFICATE-----";
        assert_eq!(certificates(cut.as_bytes()), [b"foo"]);
        assert_eq!(certificates(b"-----END CERTIFICATE-----\n"), Vec::<Vec<u8>>::new());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let text = [BEGIN, b"\n", &bytes, b"\n", END].concat();
            let found = certificates(&text);
            proptest::prop_assert!(found.iter().all(|one| one.len() <= bytes.len()));
        }
    }
}
