//! The configuration that a guest receives when it boots.

use stead_schemas::guest;
use stead_schemas::instance::{Instance, Secret};
use stead_schemas::meta::Object;
use stead_schemas::names::Uid;
use stead_schemas::numbers::LaunchId;

use super::facts::incarnation;
use super::program::{argv, shutdown_grace};
use super::{Observed, volumes};

pub(super) fn guest_config(object: &Object<Instance>, seen: &Observed) -> Option<guest::Config> {
    let (image, machine) = (seen.parts.image_config.as_ref()?, seen.machine.as_ref()?);
    let from_image = image.env.iter().map(|(key, value)| (key.clone(), Secret(value.clone())));
    let from_instance = match &object.spec.egress {
        Some(egress) => egress.guest_env(&object.spec.env),
        None => object.spec.env.clone(),
    };
    Some(guest::Config {
        hostname: object.meta.name.to_string(),
        machine_id: machine_id(&object.meta.uid, machine.launch),
        instance: object.meta.uid.to_string(),
        argv: argv(&object.spec, image),
        env: from_image.chain(from_instance).collect(),
        working_dir: image.working_dir.clone(),
        user: image.user.clone(),
        stop_signal: image.stop_signal.clone(),
        shutdown_grace_millis: u64::try_from(shutdown_grace(&object.spec, Some(image)).as_millis())
            .unwrap_or(u64::MAX),
        network: guest_network(seen),
        volumes: volumes::guest_mounts(&object.spec, &machine.volume_sizes),
        hotplug_bytes: object.spec.hotplug.0,
        egress: guest_egress(object, seen),
        has_agent: !object.spec.skip_guest_agent,
        incarnation: incarnation(object),
    })
}

pub(super) fn guest_network(seen: &Observed) -> Option<guest::NetworkConfig> {
    seen.parts.nic.as_ref().map(|nic| guest::NetworkConfig {
        address: nic.card.address,
        prefix: nic.prefix,
        mac: Some(nic.card.mac),
        gateway: nic.gateway,
        dns: nic.dns.clone(),
        resolver: nic.resolver.clone(),
        mtu: nic.mtu,
    })
}

/// Returns what programs in the guest have to know of mediated egress.
fn guest_egress(object: &Object<Instance>, seen: &Observed) -> Option<guest::EgressConfig> {
    let (egress, mediation) = (object.spec.egress.as_ref()?, seen.parts.mediation.as_ref()?);
    // Connections are intercepted for credentials only.
    let is_intercepted = !egress.credentials.is_empty() && !egress.is_observing;
    let certificate = is_intercepted.then(|| egress.authority.certificate.clone());
    Some(guest::EgressConfig { proxy: mediation.proxy.clone(), certificate })
}

/// Returns the machine id of a launch: the uid read as a number in base 36 (24 digits are below 2^124),
/// combined with the number of the launch in its low bits. Two launches of an instance never share an id.
pub(super) fn machine_id(uid: &Uid, launch: LaunchId) -> String {
    let number = uid.as_str().bytes().fold(0u128, |number, byte| {
        let digit = char::from(byte).to_digit(36).unwrap_or(0);
        number.wrapping_mul(36).wrapping_add(u128::from(digit))
    });
    format!("{:032x}", number ^ u128::from(launch.0))
}
