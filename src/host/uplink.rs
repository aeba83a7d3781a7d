//! The speed of the host's uplinks, as the kernel shows it.

use std::fs;
use std::path::Path;

use futures::TryStreamExt;
use stead_controllers::host::HostError;
use stead_schemas::names::LinkName;
use stead_schemas::quantity::Rate;

use super::link_messages;
use super::netlink::Netlink;

/// Directory in which the kernel shows the properties of links.
const LINKS: &str = "/sys/class/net";
/// Bytes per second of a megabit per second, the unit of the kernel's speeds.
const MEGABIT: u64 = 125_000;

impl Netlink {
    /// Returns the speed of the slowest link with a default route, or `None` if no such link has a known speed: most
    /// virtual links have none.
    ///
    /// # Errors
    /// Returns an error when links or routes cannot be listed.
    pub async fn uplink_speed(&self) -> Result<Option<Rate>, HostError> {
        let request = self.handle().route().get(link_messages::main_table_ipv4());
        let routes: Result<Vec<_>, _> = request.execute().try_collect().await;
        let routes = routes.map_err(|error| self.failed("list", "routes", error))?;
        let links = self.dump().await?;
        let uplinks = link_messages::uplinks(&routes, &links);
        let real = uplinks.into_iter().filter(|link| !link.has_made_up_speed);
        Ok(real.filter_map(|link| link.name.as_ref()).filter_map(shown).min())
    }
}

/// Returns the speed that the kernel shows of a link.
fn shown(link: &LinkName) -> Option<Rate> {
    let shown = fs::read_to_string(Path::new(LINKS).join(link.as_str()).join("speed")).ok()?;
    speed(&shown)
}

/// Returns the speed of a text such as `10000`; a link without a known speed has `-1`.
fn speed(shown: &str) -> Option<Rate> {
    let megabits: u64 = shown.trim().parse().ok()?;
    megabits.checked_mul(MEGABIT).map(Rate).filter(|rate| rate.0 > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_is_in_megabits_and_may_be_unknown() {
        assert_eq!(speed("1000\n"), Some(Rate(125_000_000)));
        for unknown in ["-1\n", "0", "", "fast", "18446744073709551615"] {
            assert_eq!(speed(unknown), None, "{unknown}");
        }
        assert_eq!(shown(&"nosuchlink".parse().expect("valid")), None);
    }
}
