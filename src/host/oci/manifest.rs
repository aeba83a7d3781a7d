//! Indexes, manifests and configurations of a registry or an archive, and their meaning for a platform.
//!
//! Errors repeat no value of a document except a few words that identify its kind, cleaned and cut: the document may
//! belong to another service, reached by a redirect.

use oci_client::manifest::{ImageIndexEntry, OciImageIndex, OciImageManifest};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use stead_schemas::image::ImageConfig;
use stead_schemas::limits::ENV_VAR_BYTES_MAX;
use stead_schemas::names::{Digest, Platform};
use stead_schemas::quantity::Bytes;
use stead_schemas::validate::printable;

use super::Refused;

/// Limit on the number of layers. overlayfs takes 500, and Docker makes at most 127.
const LAYERS_MAX: usize = 500;
/// Limit on the transferred size of an image's layers together, in bytes. The largest in common use have some 20 GiB.
const LAYER_BYTES_MAX: u64 = 64 << 30;
/// Limit on a configuration's values for the program (command, environment), in bytes of JSON. A guest gets all of
/// them in one message of at most 1 MiB, together with the instance's own values.
const RUN_BYTES_MAX: usize = 256 << 10;
/// Limit on nested indexes. Builders that nest them do so once.
pub(super) const INDEXES_MAX: usize = 4;

/// A manifest with its configuration, both verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) layers: Vec<Blob>,
    pub(super) config: ImageConfig,
}

/// A layer as listed by the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Blob {
    pub(super) digest: Digest,
    pub(super) size: Bytes,
    /// Digest of the uncompressed archive, from the configuration.
    pub(super) diff_id: Digest,
}

/// The platform and processor level for which images are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub platform: Platform,
    /// x86-64 level that guests certainly have, from 1 to 4. It has no meaning on other architectures.
    pub level: u8,
}

impl Target {
    /// Returns the target for guests. With KVM they have this host's processor, otherwise one of which little is
    /// known.
    #[must_use]
    pub fn of_guests(platform: Platform, have_host_processor: bool) -> Self {
        if have_host_processor { Self { platform, level: host_level() } } else { Self::plain(platform) }
    }

    /// Returns the target for guests of whose processor only the architecture is known.
    #[must_use]
    pub fn plain(platform: Platform) -> Self {
        Self { platform, level: 1 }
    }
}

#[cfg(target_arch = "x86_64")]
fn host_level() -> u8 {
    macro_rules! has {
        ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    }
    let v2 = has!("cmpxchg16b", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3");
    let v3 = v2 && has!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave");
    let v4 = v3 && has!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl");
    1 + u8::from(v2) + u8::from(v3) + u8::from(v4)
}

#[cfg(not(target_arch = "x86_64"))]
fn host_level() -> u8 {
    1
}

pub(super) fn digest_of(bytes: &[u8]) -> Digest {
    digest_from(Sha256::new_with_prefix(bytes))
}

pub(super) fn digest_from(hash: Sha256) -> Digest {
    format!("sha256:{}", hex::encode(hash.finalize())).parse().expect("a hash is a digest")
}

pub(super) fn as_index(bytes: &[u8]) -> Option<OciImageIndex> {
    #[derive(Deserialize)]
    struct Probe {
        manifests: Option<serde::de::IgnoredAny>,
    }
    let probe: Probe = serde_json::from_slice(bytes).ok()?;
    probe.manifests.and_then(|_| serde_json::from_slice(bytes).ok())
}

pub(super) fn as_manifest(bytes: &[u8]) -> Result<OciImageManifest, Refused> {
    // The decoder's own message would repeat values of the document.
    serde_json::from_slice(bytes).map_err(|_| Refused::new("its manifest is not one of an image"))
}

fn is_index(entry: &ImageIndexEntry) -> bool {
    entry.media_type.ends_with("index.v1+json") || entry.media_type.ends_with("manifest.list.v2+json")
}

/// Returns `true` if an entry is an attestation of a builder about an image, which is for no platform.
fn is_attestation(entry: &ImageIndexEntry) -> bool {
    entry.platform.as_ref().is_some_and(|given| given.os.to_string() == "unknown")
}

/// Returns how well an entry fits: `None`, or a number that is higher for a better fit. Variants of an architecture
/// rank below the target's own, and a variant that the target may lack does not fit.
fn fitness(entry: &ImageIndexEntry, target: Target) -> Option<u8> {
    let given = entry.platform.as_ref()?;
    if given.os.to_string() != "linux" || given.architecture.to_string() != target.platform.architecture() {
        return None;
    }
    match (given.architecture.to_string().as_str(), given.variant.as_deref().unwrap_or_default()) {
        (_, "") => Some(1),
        ("amd64", variant) => {
            let level = variant.strip_prefix('v')?.parse().ok()?;
            (1..=target.level).contains(&level).then_some(level)
        }
        // Every 64-bit ARM is a v8. The guest may lack the features of later variants.
        ("arm64", "v8") => Some(1),
        _ => None,
    }
}

/// Chooses the entry for the target: a manifest made for it, or else the only candidate.
pub(super) fn choose(index: &OciImageIndex, target: Target) -> Result<Digest, Refused> {
    let digest = |entry: &ImageIndexEntry| {
        entry.digest.parse().map_err(|error| Refused::new(format!("its index lists a digest that {error}")))
    };
    let fitting = index.manifests.iter().filter_map(|entry| Some((fitness(entry, target)?, entry)));
    // Of equal fits the first is chosen, as in other runtimes. `max_by_key` returns the last of equals.
    if let Some((_, entry)) = fitting.rev().max_by_key(|(fitness, _)| *fitness) {
        return digest(entry);
    }
    let mut others: Vec<&ImageIndexEntry> =
        index.manifests.iter().filter(|entry| !is_attestation(entry)).collect();
    others.dedup_by(|one, other| one.digest == other.digest);
    match &others[..] {
        [lone] if lone.platform.is_none() || is_index(lone) => digest(lone),
        [_, _, ..] if others.iter().all(|entry| entry.platform.is_none()) => Err(several(&others)),
        _ => Err(Refused::unsupported(format!("it holds nothing for {}", target.platform.as_str()))),
    }
}

fn several(entries: &[&ImageIndexEntry]) -> Refused {
    let names = entries.iter().map(|entry| {
        let annotations = entry.annotations.as_ref();
        let name = annotations.and_then(|all| all.get("org.opencontainers.image.ref.name"));
        printable(name.unwrap_or(&entry.digest), 128)
    });
    ambiguous(names)
}

/// Returns the error that lists the images among which the request must choose.
pub(super) fn ambiguous(names: impl Iterator<Item = String>) -> Refused {
    let names = names.take(8).collect::<Vec<_>>().join(", ");
    Refused::new(format!("it holds several images ({names}); give one of them alone"))
}

/// Reads a manifest and its configuration and checks them against each other.
pub(super) fn read_manifest(
    digest: Digest,
    manifest: &OciImageManifest,
    config: &[u8],
    platform: Platform,
) -> Result<Manifest, Refused> {
    let found: Option<ConfigFile> = serde_json::from_slice(config).ok();
    let Some(config) = found.filter(|config| !config.rootfs.diff_ids.is_empty() || is_image(manifest)) else {
        return Err(no_image(manifest));
    };
    // Buildpacks and other tools leave it out.
    let made_for =
        if config.architecture.is_empty() { platform.architecture() } else { &config.architecture };
    if made_for != platform.architecture() || !matches!(config.os.as_str(), "" | "linux") {
        let words = format!("{}/{}", printable(&config.os, 32), printable(made_for, 32));
        return Err(Refused::unsupported(format!("it is made for {words}, not for {}", platform.as_str())));
    }
    let diff_ids = &config.rootfs.diff_ids;
    if manifest.layers.len() != diff_ids.len() || diff_ids.len() > LAYERS_MAX {
        return Err(Refused::new(
            "its manifest and configuration list different numbers of layers, or too many",
        ));
    }
    let layers = manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| {
        let digest =
            |text: &str| text.parse().map_err(|error| Refused::new(format!("a layer's digest {error}")));
        let size = u64::try_from(layer.size).map_err(|_| Refused::new("a layer has a negative size"))?;
        Ok(Blob { digest: digest(&layer.digest)?, size: Bytes(size), diff_id: digest(diff_id)? })
    });
    let layers = layers.collect::<Result<Vec<_>, Refused>>()?;
    if layers.iter().map(|layer| layer.size.0).fold(0, u64::saturating_add) > LAYER_BYTES_MAX {
        return Err(Refused::new(format!("its layers have more than {} GiB", LAYER_BYTES_MAX >> 30)));
    }
    let config = config.config.unwrap_or_default().into_config();
    if serde_json::to_vec(&config).map_or(usize::MAX, |json| json.len()) > RUN_BYTES_MAX {
        let words = "its configuration's command and environment have more than";
        return Err(Refused::new(format!("{words} {} KiB", RUN_BYTES_MAX >> 10)));
    }
    if let Some(what) = too_long(&config) {
        return Err(Refused::new(format!(
            "{what} of its configuration is longer than {ENV_VAR_BYTES_MAX} bytes"
        )));
    }
    Ok(Manifest { digest, layers, config })
}

/// Finds a word or variable that Linux gives to no program.
fn too_long(config: &ImageConfig) -> Option<String> {
    let mut words = config.entrypoint.iter().chain(&config.cmd);
    if words.any(|word| word.len() >= ENV_VAR_BYTES_MAX) {
        return Some("a word of the command".to_owned());
    }
    // A variable has an equals sign and a zero byte, too.
    let variable = config.env.iter().find(|(key, value)| key.len() + value.len() + 2 > ENV_VAR_BYTES_MAX)?;
    Some(format!("the variable {}", printable(variable.0, 64)))
}

/// Returns `true` if the manifest declares its configuration as that of a container image.
fn is_image(manifest: &OciImageManifest) -> bool {
    let kind = manifest.config.media_type.as_str();
    let is_config =
        ["", "application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"]
            .contains(&kind);
    manifest.artifact_type.is_none() && is_config
}

fn no_image(manifest: &OciImageManifest) -> Refused {
    let kind = manifest.artifact_type.as_deref().unwrap_or(&manifest.config.media_type);
    if is_image(manifest) {
        return Refused::new("its configuration is not one of an image");
    }
    Refused::new(format!("it is not a container image (its type is {})", printable(kind, 128)))
}

/// The parts of an OCI image configuration that run a program.
#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<RunConfig>,
    #[serde(default)]
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
}

impl RunConfig {
    fn into_config(self) -> ImageConfig {
        let pairs = self.env.unwrap_or_default();
        let env = pairs.iter().filter_map(|pair| pair.split_once('=')).filter(|(key, _)| !key.is_empty());
        ImageConfig {
            entrypoint: self.entrypoint.unwrap_or_default(),
            cmd: self.cmd.unwrap_or_default(),
            env: env.map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            working_dir: self.working_dir.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            stop_signal: self.stop_signal.filter(|signal| !signal.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use stead_controllers::host::HostErrorKind;

    use super::*;

    fn target(level: u8) -> Target {
        Target { platform: Platform::LinuxAmd64, level }
    }

    fn digest(fill: char) -> String {
        format!("sha256:{}", fill.to_string().repeat(64))
    }

    fn entry(fill: char, platform: Value) -> Value {
        json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(fill), "size": 1,
                "platform": platform })
    }

    fn chosen(entries: &[Value], target: Target) -> Result<String, Refused> {
        let index = json!({ "schemaVersion": 2, "manifests": entries });
        let index = as_index(index.to_string().as_bytes()).expect("an index");
        choose(&index, target).map(|digest| digest.to_string())
    }

    fn linux(architecture: &str, variant: Option<&str>) -> Value {
        match variant {
            Some(variant) => json!({ "os": "linux", "architecture": architecture, "variant": variant }),
            None => json!({ "os": "linux", "architecture": architecture }),
        }
    }

    #[test]
    fn the_best_variant_that_the_guests_processor_certainly_has_is_chosen() {
        let all = [
            entry('4', linux("amd64", Some("v4"))),
            entry('3', linux("amd64", Some("v3"))),
            entry('2', linux("amd64", Some("v2"))),
            entry('1', linux("amd64", None)),
        ];
        for (level, expected) in [(1, '1'), (2, '2'), (3, '3'), (4, '4')] {
            assert_eq!(chosen(&all, target(level)).expect("there is one"), digest(expected));
        }
        let refused = chosen(&all[..2], target(2)).expect_err("the processor may lack what they need");
        assert_eq!(refused.kind, HostErrorKind::Unsupported);
        let equal = [entry('a', linux("amd64", None)), entry('b', linux("amd64", Some("v1")))];
        assert_eq!(chosen(&equal, target(4)).expect("there is one"), digest('a'), "the first of equals");
        let arm = Target::plain(Platform::LinuxArm64);
        let variants = [entry('9', linux("arm64", Some("v9"))), entry('8', linux("arm64", Some("v8")))];
        assert_eq!(chosen(&variants, arm).expect("there is one"), digest('8'));
        let windows = json!({ "os": "windows", "architecture": "amd64" });
        chosen(&[entry('w', windows), entry('8', linux("arm64", None))], target(4)).expect_err("neither");
    }

    #[test]
    fn entries_without_a_platform_are_taken_when_there_is_no_doubt() {
        let plain = |fill: char| {
            json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json",
                                         "digest": digest(fill), "size": 1 })
        };
        let named = |fill: char, name: &str| {
            let mut entry = plain(fill);
            entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
            entry
        };
        assert_eq!(chosen(&[plain('a')], target(1)).expect("the only one"), digest('a'));
        let unknown = json!({ "os": "unknown", "architecture": "unknown" });
        let attested = [plain('a'), entry('b', unknown)];
        assert_eq!(chosen(&attested, target(1)).expect("the other says of it"), digest('a'));
        let tags = [named('a', "v1"), named('a', "latest")];
        assert_eq!(chosen(&tags, target(1)).expect("one with two names"), digest('a'));
        let refused = chosen(&[named('a', "one"), named('b', "two")], target(1)).expect_err("which?");
        assert!(refused.message.contains("one, two"), "{}", refused.message);
        chosen(&[], target(1)).expect_err("nothing");
    }

    fn read(config: &Value, media_type: &str, artifact: Option<&str>) -> Result<Manifest, Refused> {
        let config = config.to_string();
        let mut manifest = json!({
            "schemaVersion": 2,
            "config": { "mediaType": media_type, "digest": digest('c'), "size": config.len() },
            "layers": [{ "mediaType": "x", "digest": digest('e'), "size": 1 }]
        });
        if let Some(artifact) = artifact {
            manifest["artifactType"] = artifact.into();
        }
        let manifest = as_manifest(manifest.to_string().as_bytes())?;
        read_manifest(digest_of(b"m"), &manifest, config.as_bytes(), Platform::LinuxAmd64)
    }

    #[test]
    fn what_is_no_image_is_named_and_what_lacks_its_architecture_is_taken() {
        let kind = "application/vnd.oci.image.config.v1+json";
        let layers = json!({ "diff_ids": [digest('d')] });
        read(&json!({ "rootfs": layers }), kind, None).expect("without architecture and system");
        read(&json!({ "architecture": "amd64", "os": "linux", "rootfs": layers }), kind, None).expect("full");
        let with = |config: Value| read(&json!({ "config": config, "rootfs": layers }), kind, None);
        let text = |bytes: usize| "x".repeat(bytes);
        let refusal = |config: Value| with(config).expect_err("no program can be given that").message;
        with(json!({ "Env": [format!("A={}", text(ENV_VAR_BYTES_MAX - 3))] })).expect("the longest variable");
        let longer = refusal(json!({ "Env": [format!("A={}", text(ENV_VAR_BYTES_MAX - 2))] }));
        assert!(longer.contains("the variable A"), "{longer}");
        for field in ["Entrypoint", "Cmd"] {
            with(json!({ field: ["a", text(ENV_VAR_BYTES_MAX - 1)] })).expect("the longest word");
            let longer = refusal(json!({ field: ["a", text(ENV_VAR_BYTES_MAX)] }));
            assert!(longer.contains("a word of the command"), "{longer}");
        }
        let many: Vec<String> = (0..3).map(|at| format!("A{at}={}", text(ENV_VAR_BYTES_MAX - 4))).collect();
        assert!(refusal(json!({ "Env": many })).contains("256 KiB"));
        for config in [
            json!({ "architecture": "s390x", "rootfs": layers }),
            json!({ "os": "windows", "rootfs": layers }),
        ] {
            assert_eq!(read(&config, kind, None).expect_err("foreign").kind, HostErrorKind::Unsupported);
        }
        let chart = "application/vnd.cncf.helm.config.v1+json";
        for refused in [
            read(&json!({ "name": "chart" }), chart, None).expect_err("a chart"),
            read(&json!({}), "application/vnd.oci.empty.v1+json", Some(chart)).expect_err("an artefact"),
            read(&json!("text"), chart, None).expect_err("no object"),
        ] {
            let words = format!("not a container image (its type is {chart})");
            assert!(refused.message.contains(&words), "{}", refused.message);
            assert_eq!(refused.kind, HostErrorKind::Permanent);
        }
    }
}
