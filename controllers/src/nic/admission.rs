//! Admission of ports. Only the admission of instances makes ports.

use stead_schemas::meta::{OwnerRef, Tags};
use stead_schemas::names::{LinkName, Name, Uid};
use stead_schemas::network::{Mac, Nic, NicSpec};

use crate::network::admission as networks;
use crate::refused::Refused;
use crate::store::{New, Tx};

/// Claim table of traffic classes. Minor numbers have 16 bits; the kernel uses the first and the last itself.
const CLASSES: &str = "shaping_class";
const CLASS_FIRST: u32 = 1;
const CLASS_LAST: u32 = 0xfffe;

/// Stores the spec of a new port with its address, on the first segment of the network that has room.
pub(crate) fn create(tx: &mut Tx<'_>, owner: &OwnerRef, tap_prefix: &str) -> Result<Uid, Refused> {
    let uid = tx.next_uid();
    let (network, spec, address) = networks::assign(tx, &uid)?;
    let tap: Result<LinkName, _> = format!("{tap_prefix}{}", uid.short()).parse();
    let spec = NicSpec {
        network,
        bridge: spec.bridge,
        tap: tap.map_err(|error| Refused::conflict(format!("the TAP prefix {error}")))?,
        table: spec.table,
        address,
        mac: Mac::of_address(address),
        class: class(tx, &uid)?,
    };
    let name = Name::from(&uid);
    let new = New { uid: Some(uid), name, tags: Tags::new(), owner: Some(owner.clone()), spec };
    Ok(tx.create::<Nic>(new)?.meta.uid.clone())
}

fn class(tx: &mut Tx<'_>, nic: &Uid) -> Result<u16, Refused> {
    let class = tx.claim_lowest(CLASSES, CLASS_FIRST..=CLASS_LAST, nic);
    let class = class.and_then(|class| u16::try_from(class).ok());
    class.ok_or_else(|| Refused::no_room("no traffic class is free"))
}
