//! Limits of the traffic of an instance on the wire.

use super::fields::Fields;
use crate::instance::Rates;
use crate::limits::{BANDWIDTH_MAX, BANDWIDTH_MIN};
use crate::quantity::Rate;
use crate::validate::FieldErrors;

pub(super) const DOWNLOAD: (&str, &str) = ("bandwidth_download", "invalid_bandwidth_download");
pub(super) const UPLOAD: (&str, &str) = ("bandwidth_upload", "invalid_bandwidth_upload");

/// The limits that a request names. Zero means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BandwidthAsked {
    /// Limit of the traffic to the guest.
    pub download: Option<Rate>,
    /// Limit of the traffic from the guest.
    pub upload: Option<Rate>,
}

impl BandwidthAsked {
    /// Reads the limits of a request's `network`.
    pub(super) fn read(network: &mut Fields, errors: &mut FieldErrors) -> Self {
        let mut limit = |(key, code)| {
            let rate: Rate = network.parsed(key, code, errors)?;
            if rate.0 > 0 && !(BANDWIDTH_MIN..=BANDWIDTH_MAX).contains(&rate) {
                let message = format!("must be 0 for no limit, or from {BANDWIDTH_MIN} to {BANDWIDTH_MAX}");
                errors.push(network.path(key), code, message);
                return None;
            }
            Some(rate)
        };
        Self { download: limit(DOWNLOAD), upload: limit(UPLOAD) }
    }

    /// Returns the limits that ask for something, as the problems that they are without a network.
    #[must_use]
    pub fn without_network(self) -> FieldErrors {
        let mut errors = FieldErrors::default();
        for (rate, (key, code)) in [(self.download, DOWNLOAD), (self.upload, UPLOAD)] {
            if rate.is_some_and(|rate| rate.0 > 0) {
                errors.push(format!("network.{key}"), code, "needs network.enabled");
            }
        }
        errors
    }

    /// Returns an instance's limits after a change to those that this names.
    #[must_use]
    pub fn changed(self, rates: Rates) -> Rates {
        Rates {
            download: self.download.or(rates.download),
            upload: self.upload.or(rates.upload),
            disk: rates.disk,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::network::NetworkAsked;
    use super::*;

    fn read(network: Value) -> Result<BandwidthAsked, Vec<(String, &'static str)>> {
        let mut errors = FieldErrors::default();
        let mut fields = Fields::body(json!({ "network": network }), &mut errors);
        let asked = NetworkAsked::read(&mut fields, &mut errors).bandwidth;
        fields.finish(&mut errors);
        let problems: Vec<_> = errors.iter().map(|error| (error.path.clone(), error.code)).collect();
        if problems.is_empty() { Ok(asked) } else { Err(problems) }
    }

    #[test]
    fn a_limit_is_zero_or_within_the_bounds() {
        let download = |text: &str| read(json!({ "bandwidth_download": text })).map(|asked| asked.download);
        let refused = || Err(vec![("network.bandwidth_download".to_owned(), "invalid_bandwidth_download")]);
        for (text, expected) in [
            ("0", Ok(Some(Rate(0)))),
            ("64kbps", Ok(Some(BANDWIDTH_MIN))),
            ("400Gbps", Ok(Some(BANDWIDTH_MAX))),
            ("12MB/s", Ok(Some(Rate(12 << 20)))),
            ("63kbps", refused()),
            ("7bps", refused()),
            ("401Gbps", refused()),
            ("fast", refused()),
            ("", refused()),
        ] {
            assert_eq!(download(text), expected, "{text}");
        }
    }

    #[test]
    fn limits_are_changed_one_by_one() {
        let upload = Some(Rate(1_000_000));
        assert_eq!(read(json!({})), Ok(BandwidthAsked::default()));
        let asked = read(json!({ "bandwidth_upload": "8Mbps", "bandwidth_download": null })).expect("valid");
        assert_eq!(asked, BandwidthAsked { download: None, upload });
        let before = Rates { download: Some(Rate(5)), upload: Some(Rate(6)), disk: Some(Rate(7)) };
        assert_eq!(asked.changed(before), Rates { upload, ..before });
        assert_eq!(
            read(json!({ "bandwidth_upload": "8Mbps", "enabled": false, "mtu": 1 })),
            Err(vec![
                ("network.bandwidth_upload".to_owned(), "invalid_bandwidth_upload"),
                ("network.mtu".to_owned(), "invalid_request"),
            ])
        );
    }
}
