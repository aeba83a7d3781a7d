//! The contents of a bundle of certificates with the authority added. Pure.
//!
//! Guarantees: the certificate is in the result once, and adding it twice is the same as adding it once. Nothing of
//! the bundle is removed but what stands between our own two marks. The marks are comments to every reader of PEM.

const BEGIN: &str = "# Certificate authority of Stead egress: begin";
const END: &str = "# Certificate authority of Stead egress: end";

/// Returns the bundle with the certificate, which is PEM that ends with a newline. The certificate of an earlier
/// authority between our marks is replaced: a disk may come from a snapshot of another instance. A bundle that the
/// image's own program made again has the certificate without the marks, and keeps it so.
pub(super) fn with_certificate(bundle: &[u8], certificate: &str) -> Vec<u8> {
    let mut merged = without_block(bundle);
    if contains(&merged, certificate.trim_end().as_bytes()) {
        return merged;
    }
    if merged.last().is_some_and(|&last| last != b'\n') {
        merged.push(b'\n');
    }
    merged.extend(format!("{BEGIN}\n{certificate}{END}\n").bytes());
    merged
}

/// Returns the bundle without what stands between our marks. A mark without its other one is a comment like any other.
fn without_block(bundle: &[u8]) -> Vec<u8> {
    // The marks pair like brackets: otherwise the removal of one pair could bring two others together.
    let (mut kept, mut begins) = (Vec::with_capacity(bundle.len()), Vec::new());
    for line in bundle.split_inclusive(|&byte| byte == b'\n') {
        let text = line.trim_ascii();
        if text == BEGIN.as_bytes() {
            begins.push(kept.len());
        }
        kept.extend(line);
        if text == END.as_bytes()
            && let Some(begin) = begins.pop()
        {
            kept.truncate(begin);
        }
    }
    kept
}

fn contains(bundle: &[u8], certificate: &[u8]) -> bool {
    !certificate.is_empty() && bundle.windows(certificate.len()).any(|part| part == certificate)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};

    use super::*;

    const OURS: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    const EARLIER: &str = "-----BEGIN CERTIFICATE-----\nBBBB\n-----END CERTIFICATE-----\n";
    const PUBLIC: &str = "# A public one\n-----BEGIN CERTIFICATE-----\nCCCC\n-----END CERTIFICATE-----\n";

    fn merge(bundle: &str, certificate: &str) -> String {
        String::from_utf8(with_certificate(bundle.as_bytes(), certificate)).expect("text")
    }

    #[test]
    fn the_certificate_follows_those_of_the_image() {
        assert_eq!(merge(PUBLIC, OURS), format!("{PUBLIC}{BEGIN}\n{OURS}{END}\n"));
        assert_eq!(merge("", OURS), format!("{BEGIN}\n{OURS}{END}\n"));
        let unended = PUBLIC.trim_end();
        assert_eq!(merge(unended, OURS), merge(PUBLIC, OURS), "a last line without its end is ended");
    }

    #[test]
    fn the_authority_of_an_earlier_instance_is_replaced() {
        let earlier = merge(PUBLIC, EARLIER);
        assert_eq!(merge(&earlier, OURS), merge(PUBLIC, OURS));
        // Another program appended to the bundle since.
        let appended = format!("{earlier}# appended\n");
        assert_eq!(merge(&appended, OURS), merge(&format!("{PUBLIC}# appended\n"), OURS));
    }

    #[test]
    fn a_bundle_made_again_from_the_anchors_is_left_as_it_is() {
        let made_again = format!("{OURS}{PUBLIC}");
        assert_eq!(merge(&made_again, OURS), made_again);
        assert_eq!(merge(&merge(&made_again, EARLIER), OURS), made_again, "only the marked one is removed");
    }

    #[test]
    fn a_mark_without_its_other_one_removes_nothing() {
        let nested = format!("{BEGIN}\n{BEGIN}\n{OURS}{END}\n{END}\n{PUBLIC}");
        assert_eq!(merge(&nested, OURS), merge(PUBLIC, OURS));
        for bundle in [format!("{BEGIN}\n{PUBLIC}"), format!("{PUBLIC}{END}\n{BEGIN}\n"), format!("{END}\n")]
        {
            let merged = merge(&bundle, OURS);
            assert!(merged.starts_with(&bundle), "{merged}");
            assert_eq!(merge(&merged, OURS), merged);
        }
    }

    /// Parts of bundles: those of well-formed ones, marks and arbitrary bytes.
    fn part() -> impl Strategy<Value = Vec<u8>> {
        let fixed = |text: &'static str| proptest::strategy::Just(text.as_bytes().to_vec());
        prop_oneof![
            fixed(OURS),
            fixed(EARLIER),
            fixed(PUBLIC),
            fixed(BEGIN),
            fixed(END),
            fixed("\n"),
            prop::collection::vec(any::<u8>(), 0..20)
        ]
    }

    proptest! {
        #[test]
        fn any_bundle_has_the_certificate_once_added_and_stays_the_same_then(
            parts in prop::collection::vec(part(), 0..12)
        ) {
            let bundle = parts.concat();
            let merged = with_certificate(&bundle, OURS);
            prop_assert!(contains(&merged, OURS.trim_end().as_bytes()));
            prop_assert_eq!(with_certificate(&merged, OURS), merged);
        }
    }
}
