//! The certificate authority of an instance, and the leaf certificates that it signs.
//!
//! Guarantees: a leaf names exactly one host, has a random serial number and is valid from two days before it
//! was made, because guests that were restored from old snapshots have old clocks; at most
//! [`EGRESS_LEAVES_MAX`] leaves are kept, and at most [`EGRESS_LEAVES_PER_SECOND_MAX`] are made in a second.
//! Never: formats a key.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, date_time_ymd,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::crypto::ring::sign::any_ecdsa_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use stead_schemas::egress::{CertificateAuthority, Host};
use stead_schemas::instance::Secret;
use stead_schemas::limits::{EGRESS_LEAVES_MAX, EGRESS_LEAVES_PER_SECOND_MAX};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Validity of an authority: longer than any instance lives.
const AUTHORITY_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// Validity of a leaf from the time at which it is made.
const LEAF_VALIDITY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Age at which a kept leaf is replaced, well before its end.
const LEAF_AGE_MAX: Duration = Duration::from_secs(5 * 24 * 60 * 60);
/// Time before its making from which a certificate is valid.
const BACKDATING: Duration = Duration::from_secs(2 * 24 * 60 * 60);
/// Length of a serial number, in bytes.
const SERIAL_BYTES: usize = 16;
/// The subject of every authority. It is constant, so that the hashed name of its file in a guest is constant.
const SUBJECT: &str = "Stead egress";

/// The reason why there is no authority or no leaf.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the certificate authority cannot be read")]
    Malformed,
    #[error("the key does not belong to the certificate of the authority")]
    OtherKey,
    #[error("too many certificates were made within a second")]
    TooMany,
    #[error("the certificate cannot be made")]
    Make(#[from] rcgen::Error),
    #[error("there are no random numbers")]
    NoRandomNumbers,
}

/// Makes the authority of a new instance.
///
/// # Errors
/// Fails without random numbers.
pub fn generate() -> Result<CertificateAuthority, AuthorityError> {
    let key = KeyPair::generate()?;
    let mut params = subject();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.serial_number = Some(serial()?);
    set_validity(&mut params, SystemTime::now(), AUTHORITY_VALIDITY);
    let certificate = params.self_signed(&key)?.pem();
    Ok(CertificateAuthority { certificate, key: Secret(key.serialize_pem()) })
}

/// Returns parameters with the subject of every authority.
fn subject() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, SUBJECT);
    params
}

fn serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; SERIAL_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| AuthorityError::NoRandomNumbers)?;
    // A serial number is positive and has no leading zeros.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn set_validity(params: &mut CertificateParams, now: SystemTime, validity: Duration) {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_epoch.saturating_sub(BACKDATING);
    params.not_after = epoch + since_epoch + validity;
}

/// The key of all leaves of this process.
pub(crate) struct LeafKey {
    pair: KeyPair,
    signing: Arc<dyn SigningKey>,
}

impl LeafKey {
    pub(crate) fn generate() -> Result<Self, AuthorityError> {
        let pair = KeyPair::generate()?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let signing = any_ecdsa_type(&der).map_err(|_| AuthorityError::Malformed)?;
        Ok(Self { pair, signing })
    }
}

impl fmt::Debug for LeafKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LeafKey")
    }
}

/// The authority of one instance.
pub(crate) struct Authority {
    /// The form that it was read from.
    source: CertificateAuthority,
    issuer: Issuer<'static, KeyPair>,
    leaves: Mutex<Leaves>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// Reads an authority that [`generate`] made.
    pub(crate) fn read(source: &CertificateAuthority) -> Result<Self, AuthorityError> {
        let certificate = CertificateDer::from_pem_slice(source.certificate.as_bytes());
        let certificate = certificate.map_err(|_| AuthorityError::Malformed)?;
        let key = KeyPair::from_pem(&source.key.0).map_err(|_| AuthorityError::Malformed)?;
        let public = key.der_bytes();
        if !certificate.windows(public.len()).any(|window| window == public) {
            return Err(AuthorityError::OtherKey);
        }
        let issuer = Issuer::new(subject(), key);
        Ok(Self { source: source.clone(), issuer, leaves: Mutex::default() })
    }

    /// Returns `true` for the authority that is read from this form.
    pub(crate) fn is_from(&self, source: &CertificateAuthority) -> bool {
        self.source == *source
    }

    /// Returns a leaf for the host, a kept one if there is one.
    pub(crate) fn leaf(
        &self,
        host: &Host,
        key: &LeafKey,
        now: SystemTime,
    ) -> Result<Arc<CertifiedKey>, AuthorityError> {
        let mut leaves = self.leaves.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(leaf) = leaves.find(host, now) {
            return Ok(leaf);
        }
        if !leaves.may_make(now) {
            return Err(AuthorityError::TooMany);
        }
        let leaf = Arc::new(self.make(host, key, now)?);
        leaves.keep(host.clone(), leaf.clone(), now);
        Ok(leaf)
    }

    fn make(&self, host: &Host, key: &LeafKey, now: SystemTime) -> Result<CertifiedKey, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![match host {
            Host::Name(name) => SanType::DnsName(name.as_str().try_into()?),
            Host::Address(address) => SanType::IpAddress(*address),
        }];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial()?);
        set_validity(&mut params, now, LEAF_VALIDITY);
        let certificate = params.signed_by(&key.pair, &self.issuer)?;
        Ok(CertifiedKey::new(vec![certificate.der().clone()], key.signing.clone()))
    }
}

/// The kept leaves.
#[derive(Debug, Default)]
struct Leaves {
    kept: BTreeMap<Host, Kept>,
    /// Number of uses of all leaves, which orders them by use.
    uses: u64,
    /// The second of the latest making, and the number of leaves that were made in it.
    made: (u64, u32),
}

#[derive(Debug)]
struct Kept {
    leaf: Arc<CertifiedKey>,
    made_at: SystemTime,
    used: u64,
}

impl Leaves {
    fn find(&mut self, host: &Host, now: SystemTime) -> Option<Arc<CertifiedKey>> {
        let kept = self.kept.get_mut(host)?;
        // The clock may have been set back.
        let age = now.duration_since(kept.made_at).ok().filter(|age| *age < LEAF_AGE_MAX);
        if age.is_none() && kept.made_at.duration_since(now).unwrap_or(DAY) >= DAY {
            return None;
        }
        self.uses += 1;
        kept.used = self.uses;
        Some(kept.leaf.clone())
    }

    /// Takes a permit to make a leaf.
    fn may_make(&mut self, now: SystemTime) -> bool {
        let second = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        if self.made.0 != second {
            self.made = (second, 0);
        }
        self.made.1 += 1;
        self.made.1 <= EGRESS_LEAVES_PER_SECOND_MAX
    }

    fn keep(&mut self, host: Host, leaf: Arc<CertifiedKey>, made_at: SystemTime) {
        if self.kept.len() >= EGRESS_LEAVES_MAX && !self.kept.contains_key(&host) {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.used).map(|(host, _)| host.clone());
            oldest.map(|host| self.kept.remove(&host));
        }
        self.uses += 1;
        self.kept.insert(host, Kept { leaf, made_at, used: self.uses });
    }
}

#[cfg(test)]
mod tests {
    use rustls::RootCertStore;
    use rustls::client::WebPkiServerVerifier;
    use rustls::client::danger::ServerCertVerifier;
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;

    fn host(text: &str) -> Host {
        text.parse().expect("a host")
    }

    fn is_valid_for(source: &CertificateAuthority, leaf: &CertifiedKey, name: &str, at: SystemTime) -> bool {
        let mut roots = RootCertStore::empty();
        let root = CertificateDer::from_pem_slice(source.certificate.as_bytes()).expect("a certificate");
        roots.add(root).expect("added");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().expect("built");
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let at = UnixTime::since_unix_epoch(at.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970"));
        verifier.verify_server_cert(&leaf.cert[0], &[], &name, &[], at).is_ok()
    }

    #[test]
    fn a_leaf_is_valid_for_its_one_host_and_under_its_own_authority() {
        let (source, other) = (generate().expect("made"), generate().expect("made"));
        let (authority, key) = (Authority::read(&source).expect("read"), LeafKey::generate().expect("made"));
        let now = SystemTime::now();
        let leaf = authority.leaf(&host("api.example.com"), &key, now).expect("made");
        assert!(is_valid_for(&source, &leaf, "api.example.com", now));
        assert!(is_valid_for(&source, &leaf, "api.example.com", now - DAY), "a clock that is a day late");
        assert!(!is_valid_for(&source, &leaf, "www.example.com", now));
        assert!(!is_valid_for(&source, &leaf, "api.example.com", now + DAY * 8));
        assert!(!is_valid_for(&other, &leaf, "api.example.com", now));
        let leaf = authority.leaf(&host("[2001:db8::1]"), &key, now).expect("made");
        assert!(is_valid_for(&source, &leaf, "2001:db8::1", now));
    }

    #[test]
    fn a_key_of_another_authority_is_refused() {
        let (one, other) = (generate().expect("made"), generate().expect("made"));
        let mixed = CertificateAuthority { certificate: one.certificate.clone(), key: other.key.clone() };
        assert!(matches!(Authority::read(&mixed), Err(AuthorityError::OtherKey)));
        let broken = CertificateAuthority { certificate: "x".to_owned(), key: one.key.clone() };
        assert!(matches!(Authority::read(&broken), Err(AuthorityError::Malformed)));
        assert!(!format!("{:?}", Authority::read(&one)).contains("BEGIN"));
    }

    #[test]
    fn leaves_are_kept_within_bounds_and_made_at_a_bounded_rate() {
        let authority = Authority::read(&generate().expect("made")).expect("read");
        let key = LeafKey::generate().expect("made");
        let start = SystemTime::UNIX_EPOCH + DAY * 20_000;
        let name = |index: usize| host(&format!("h{index}.example.com"));
        let per_second = usize::try_from(EGRESS_LEAVES_PER_SECOND_MAX).expect("small");
        for index in 0..per_second {
            authority.leaf(&name(index), &key, start).expect("within the rate");
        }
        assert!(matches!(authority.leaf(&name(per_second), &key, start), Err(AuthorityError::TooMany)));
        let first = authority.leaf(&name(0), &key, start).expect("a kept one costs nothing");
        let mut now = start;
        for index in per_second..EGRESS_LEAVES_MAX + per_second {
            now += Duration::from_secs(1);
            authority.leaf(&name(index), &key, now).expect("made");
            let again = authority.leaf(&name(0), &key, now).expect("kept");
            assert!(Arc::ptr_eq(&first, &again), "the one in use stays");
        }
        assert_eq!(authority.leaves.lock().expect("not poisoned").kept.len(), EGRESS_LEAVES_MAX);
        let later = authority.leaf(&name(0), &key, now + LEAF_AGE_MAX + DAY).expect("made");
        assert!(!Arc::ptr_eq(&first, &later), "an old leaf is replaced");
    }
}
