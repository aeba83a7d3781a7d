//! The environment variables that lead programs to the proxy of mediated egress, and to its authority. Pure.
//!
//! Guarantees: a variable that the program's own environment has is left to it, even if it is empty.

use std::collections::BTreeMap;

use stead_schemas::guest::EgressConfig;
use stead_schemas::instance::Secret;

use crate::trust::Paths;

/// Variables whose value is the URL of the proxy. curl reads the first of them only in lower case.
const PROXY: [&str; 4] = ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"];
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];
/// Hosts that programs reach without the proxy.
const LOCAL_HOSTS: &str = "localhost,127.0.0.1,::1";
/// Variables whose value is the path of a bundle, which is read in place of the program's own.
const BUNDLE: [&str; 7] = [
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
];

/// Returns the variables to add to a program's own environment. `paths` are the files that were written.
pub(crate) fn variables(
    egress: Option<&EgressConfig>,
    paths: &Paths,
    own: &BTreeMap<String, Secret>,
) -> Vec<(String, String)> {
    let Some(egress) = egress else { return Vec::new() };
    let java = paths.java_store.as_deref().map(java_options);
    let mut all: Vec<(&str, &str)> = PROXY.map(|key| (key, egress.proxy.as_str())).to_vec();
    all.extend(NO_PROXY.map(|key| (key, LOCAL_HOSTS)));
    // Node ignores the variables of the proxy without this one.
    all.push(("NODE_USE_ENV_PROXY", "1"));
    if egress.certificate.is_some() {
        all.extend(paths.certificate.as_deref().map(|path| ("NODE_EXTRA_CA_CERTS", path)));
        all.extend(java.as_deref().map(|options| ("JDK_JAVA_OPTIONS", options)));
        if let Some(path) = paths.bundle.as_deref() {
            all.extend(BUNDLE.map(|key| (key, path)));
            // Deno trusts no authority of the image without this one. It keeps its own: the bundle may have only ours.
            all.push(("DENO_TLS_CA_STORE", "mozilla,system"));
        }
    }
    let is_free = |(key, _): &(&str, &str)| !own.contains_key(*key);
    all.into_iter().filter(is_free).map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Returns the options that the `java` of versions from 9 on reads from its environment.
fn java_options(store: &str) -> String {
    format!("-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStoreType=PKCS12")
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "http://10.100.0.1:18080";
    const FILE: &str = "/run/stead-egress/authority.pem";
    const IMAGE: &str = "/etc/ssl/cert.pem";

    fn egress(certificate: Option<&str>) -> EgressConfig {
        EgressConfig { proxy: URL.to_owned(), certificate: certificate.map(str::to_owned) }
    }

    const STORE: &str = "/run/stead-egress/java.p12";

    fn paths(certificate: Option<&str>, bundle: Option<&str>, store: Option<&str>) -> Paths {
        let [certificate, bundle, java_store] =
            [certificate, bundle, store].map(|path| path.map(str::to_owned));
        Paths { certificate, bundle, java_store }
    }

    fn own(keys: &[&str]) -> BTreeMap<String, Secret> {
        keys.iter().map(|key| ((*key).to_owned(), Secret(String::new()))).collect()
    }

    /// The variables of each part, in the order of their keys.
    const WEB: [(&str, &str); 7] = [
        ("HTTPS_PROXY", URL),
        ("HTTP_PROXY", URL),
        ("NODE_USE_ENV_PROXY", "1"),
        ("NO_PROXY", "localhost,127.0.0.1,::1"),
        ("http_proxy", URL),
        ("https_proxy", URL),
        ("no_proxy", "localhost,127.0.0.1,::1"),
    ];
    const ALONE: [(&str, &str); 1] = [("NODE_EXTRA_CA_CERTS", FILE)];
    const BUNDLED: [(&str, &str); 8] = [
        ("AWS_CA_BUNDLE", IMAGE),
        ("CARGO_HTTP_CAINFO", IMAGE),
        ("CURL_CA_BUNDLE", IMAGE),
        ("DENO_TLS_CA_STORE", "mozilla,system"),
        ("GIT_SSL_CAINFO", IMAGE),
        ("PIP_CERT", IMAGE),
        ("REQUESTS_CA_BUNDLE", IMAGE),
        ("SSL_CERT_FILE", IMAGE),
    ];

    const JAVA: [(&str, &str); 1] = [(
        "JDK_JAVA_OPTIONS",
        "-Djavax.net.ssl.trustStore=/run/stead-egress/java.p12 -Djavax.net.ssl.trustStoreType=PKCS12",
    )];

    #[test]
    fn programs_get_what_was_configured_and_written_and_keep_what_they_have() {
        let both = paths(Some(FILE), Some(IMAGE), Some(STORE));
        let all = [&WEB[..], &ALONE, &BUNDLED, &JAVA].concat();
        let every_key: Vec<&str> = all.iter().map(|(key, _)| *key).collect();
        for (configured, written, keys, expected) in [
            (None, both.clone(), &[][..], vec![]),
            (Some(egress(None)), Paths::default(), &[], WEB.to_vec()),
            // Files of an earlier boot are not those of an authority.
            (Some(egress(None)), both.clone(), &[], WEB.to_vec()),
            (Some(egress(Some("PEM"))), both.clone(), &[], all.clone()),
            (Some(egress(Some("PEM"))), both.clone(), &["PATH", "proxy", "NODE_OPTIONS"], all.clone()),
            (Some(egress(Some("PEM"))), paths(Some(FILE), None, None), &[], [&WEB[..], &ALONE].concat()),
            (Some(egress(Some("PEM"))), paths(None, Some(IMAGE), None), &[], [&WEB[..], &BUNDLED].concat()),
            (Some(egress(Some("PEM"))), Paths::default(), &[], WEB.to_vec()),
            (Some(egress(Some("PEM"))), both, &every_key, vec![]),
        ] {
            let mut found = variables(configured.as_ref(), &written, &own(keys));
            let mut expected: Vec<(String, String)> =
                expected.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{configured:?} {written:?} {keys:?}");
        }
    }

    #[test]
    fn each_variable_is_left_out_alone() {
        let (egress, paths) = (egress(Some("PEM")), paths(Some(FILE), Some(IMAGE), Some(STORE)));
        let keys = |own_keys: &[&str]| -> Vec<String> {
            variables(Some(&egress), &paths, &own(own_keys)).into_iter().map(|(key, _)| key).collect()
        };
        let all = keys(&[]);
        assert_eq!(all.len(), 17);
        for key in &all {
            let expected: Vec<String> = all.iter().filter(|other| *other != key).cloned().collect();
            assert_eq!(keys(&[key]), expected, "{key}");
        }
    }
}
