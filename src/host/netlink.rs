//! Links by rtnetlink: bridges, TAPs, IFBs, addresses, and the host's routes.
//!
//! Guarantees: only links with this scope's mark are listed, changed or removed. No crash leaves an unmarked link: a
//! TAP gets its alias before it can outlive us (`tap`). Bridges and IFBs are created with a hardware address derived
//! from scope and name, by which `create` and `remove` recognise them until they have their alias.
//! Assumes: the network namespace is that of the thread that calls [`Netlink::new`].
//! Never: caches the kernel's answers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkIfb, LinkMessageBuilder, LinkUnspec};
use stead_controllers::host::{
    Forwarding, HostError, HostErrorKind, Link, LinkChange, LinkKind, LinkPlan, Links, Routes,
};
use stead_schemas::names::LinkName;
use stead_schemas::network::Cidr;

use super::link_messages::{self, Seen};
use super::marks::{BRIDGES, Scope, port_group};
use super::netlink_connection::{Connection, ENODEV, errno, io_error};
use super::tap::Tap;

/// The forwarding switch of the host. It turns on forwarding for all links, and reads as on only after that.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const LINKS: &str = "/proc/sys/net/ipv4/conf";
const LOOPBACK: &str = "lo";

/// The adapter. Clones are cheap.
#[derive(Debug, Clone)]
pub struct Netlink(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    scope: Scope,
    requests: Connection,
    /// Connection for removals. They wait for the kernel's readers (18 ms each) and delay no other request on their
    /// own socket.
    removals: Connection,
}

impl Netlink {
    /// Opens the connections.
    ///
    /// # Errors
    /// Returns an error when no netlink socket can be opened.
    pub fn new(scope: Scope) -> Result<Self, HostError> {
        let failed = |error| HostError::io("open", "a netlink socket", error);
        let requests = Connection::open().map_err(failed)?;
        let removals = Connection::open().map_err(failed)?;
        Ok(Self(Arc::new(Inner { scope, requests, removals })))
    }

    pub(super) fn scope(&self) -> &Scope {
        &self.0.scope
    }

    pub(super) fn handle(&self) -> Handle {
        self.0.requests.handle()
    }

    /// Returns the number by which the kernel's messages name the sender of our requests.
    pub(super) fn port_number(&self) -> u32 {
        self.0.requests.port_number()
    }

    /// Converts the error of a request into the port's terms.
    pub(super) fn failed(
        &self,
        operation: &'static str,
        subject: &str,
        error: rtnetlink::Error,
    ) -> HostError {
        self.0.requests.failed(operation, subject, error)
    }

    /// Returns the link of this name, ours or foreign.
    pub(super) async fn get(&self, name: &LinkName) -> Result<Option<Seen>, HostError> {
        let request = self.handle().link().get().match_name(name.as_str());
        let found = self.one(request, "inspect link", name.as_str()).await?;
        // The kernel finds alternative names too. Such a link is another one.
        Ok(found.filter(|seen| seen.name.as_ref() == Some(name)))
    }

    pub(super) async fn by_index(&self, index: u32) -> Result<Option<Seen>, HostError> {
        let request = self.handle().link().get().match_index(index);
        self.one(request, "inspect link", &index.to_string()).await
    }

    async fn one(
        &self,
        request: rtnetlink::LinkGetRequest,
        operation: &'static str,
        subject: &str,
    ) -> Result<Option<Seen>, HostError> {
        match request.execute().try_next().await {
            Ok(message) => Ok(message.map(Seen::from)),
            Err(error) if errno(&error) == Some(ENODEV) => Ok(None),
            Err(error) => Err(self.failed(operation, subject, error)),
        }
    }

    /// Returns a link that is ours by its alias. Otherwise the error is Missing or Conflict.
    pub(super) async fn ours(&self, operation: &'static str, name: &LinkName) -> Result<Seen, HostError> {
        let seen = self.get(name).await?;
        let seen = seen.ok_or_else(|| HostError::new(HostErrorKind::Missing, operation, name.as_str()))?;
        if seen.owner(self.scope()).is_none() {
            return Err(not_ours(operation, name));
        }
        Ok(seen)
    }

    async fn set(
        &self,
        operation: &'static str,
        name: &LinkName,
        message: LinkMessage,
    ) -> Result<(), HostError> {
        let done = self.handle().link().change(message).execute().await;
        done.map_err(|error| self.failed(operation, name.as_str(), error))
    }

    async fn create_tap(&self, plan: &LinkPlan) -> Result<(), HostError> {
        let failed = |error| HostError::io("create link", plan.name.as_str(), error);
        let tap = Tap::create(&plan.name, plan.has_queues).map_err(failed)?;
        let made = self.get(&plan.name).await?;
        let made =
            made.ok_or_else(|| HostError::new(HostErrorKind::Transient, "create link", plan.name.as_str()))?;
        self.finish(&plan.name, made.index, self.scope().alias(&plan.owner)).await?;
        tap.persist().map_err(failed)
    }

    async fn create_bridge(&self, plan: &LinkPlan) -> Result<(), HostError> {
        let message = LinkMessageBuilder::<LinkBridge>::new(plan.name.as_str())
            .address(self.scope().creation_mac(&plan.name).0.to_vec())
            // Guests get no multicast except what the filter passes, and no one is there to subscribe to it.
            .mcast_snooping(false)
            .build();
        self.create_with(plan, message).await
    }

    async fn create_ifb(&self, plan: &LinkPlan) -> Result<(), HostError> {
        let mac = self.scope().creation_mac(&plan.name);
        let message = LinkIfb::new(plan.name.as_str()).address(mac.0.to_vec()).build();
        self.create_with(plan, message).await
    }

    /// Creates a link with its derived hardware address, and marks it.
    async fn create_with(&self, plan: &LinkPlan, message: LinkMessage) -> Result<(), HostError> {
        let done = self.handle().link().add(message).execute().await;
        done.map_err(|error| self.failed("create link", plan.name.as_str(), error))?;
        let made = self.get(&plan.name).await?;
        let made = made.filter(|made| made.is_half_made(self.scope()));
        let made =
            made.ok_or_else(|| HostError::new(HostErrorKind::Transient, "create link", plan.name.as_str()))?;
        self.finish(&plan.name, made.index, self.scope().alias(&plan.owner)).await
    }

    /// Disables IPv6 on the link, then completes the mark: a marked link is a complete one.
    async fn finish(&self, name: &LinkName, index: u32, alias: String) -> Result<(), HostError> {
        let switch = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
        if Path::new(&switch).exists() {
            fs::write(&switch, "1").map_err(|error| HostError::io("write", switch, error))?;
            let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
            let silent = LinkUnspec::new_with_index(index)
                .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])]))
                .build();
            self.set("create link", name, silent).await?;
        }
        self.set("create link", name, LinkUnspec::new_with_index(index).alias(alias).build()).await
    }

    /// Raises a link. A bridge enters the group of all bridges before a packet passes it.
    async fn raise(&self, name: &LinkName, seen: &Seen) -> Result<(), HostError> {
        if seen.kind == Some(LinkKind::Bridge) {
            let group = LinkAttribute::Group(BRIDGES);
            let message = LinkUnspec::new_with_index(seen.index).append_extra_attribute(group).build();
            self.set("raise link", name, message).await?;
        }
        self.set("raise link", name, LinkUnspec::new_with_index(seen.index).up().build()).await
    }

    async fn enslave(&self, tap: &LinkName, index: u32, bridge: &LinkName) -> Result<(), HostError> {
        let master = self.ours("enslave to link", bridge).await?;
        if master.kind != Some(LinkKind::Bridge) {
            return Err(not_ours("enslave to link", bridge));
        }
        self.set("enslave link", tap, LinkUnspec::new_with_index(index).controller(master.index).build())
            .await
    }

    /// Isolates the port, and puts it into the group that the filter treats as guests.
    async fn isolate(&self, tap: &LinkName, seen: &Seen) -> Result<(), HostError> {
        let master = match seen.master {
            Some(index) => self.by_index(index).await?.and_then(|master| master.name),
            None => None,
        };
        let Some(bridge) = master else {
            return Err(HostError::new(HostErrorKind::Missing, "isolate link", tap.as_str())
                .because("it is on no bridge"));
        };
        let message = LinkBridgePort::new(seen.index).isolated(true).link_group(port_group(&bridge)).build();
        self.set("isolate link", tap, message).await
    }

    async fn add_address(&self, link: &LinkName, index: u32, address: Cidr) -> Result<(), HostError> {
        let request = self.handle().address().add(index, address.address.into(), address.prefix);
        match request.execute().await {
            Err(error) if io_error(&error).kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done.map_err(|error| self.failed("add an address to", link.as_str(), error)),
        }
    }

    async fn remove_address(&self, link: &LinkName, index: u32, address: Cidr) -> Result<(), HostError> {
        let failed = |error| self.failed("remove an address from", link.as_str(), error);
        for message in self.address_messages(index).await? {
            if address_of(&message) == Some(address) {
                self.handle().address().del(message).execute().await.map_err(failed)?;
            }
        }
        Ok(())
    }

    async fn address_messages(&self, index: u32) -> Result<Vec<AddressMessage>, HostError> {
        let request = self.handle().address().get().set_link_index_filter(index);
        let all: Result<Vec<AddressMessage>, _> = request.execute().try_collect().await;
        let mut all = all.map_err(|error| self.failed("list", "addresses", error))?;
        all.retain(|message| message.header.index == index);
        Ok(all)
    }

    async fn addresses(&self, index: u32) -> Result<Vec<Cidr>, HostError> {
        let mut all: Vec<Cidr> = self.address_messages(index).await?.iter().filter_map(address_of).collect();
        all.sort_unstable();
        Ok(all)
    }

    pub(super) async fn dump(&self) -> Result<Vec<Seen>, HostError> {
        let all: Result<Vec<LinkMessage>, _> = self.handle().link().get().execute().try_collect().await;
        let all = all.map_err(|error| self.failed("list", "links", error))?;
        Ok(all.into_iter().map(Seen::from).collect())
    }

    /// Returns the forwarding switches that are off, of the links that guest packets may use: those with an address.
    async fn links_that_do_not_forward(&self) -> Result<Vec<String>, HostError> {
        let all: Result<Vec<AddressMessage>, _> = self.handle().address().get().execute().try_collect().await;
        let all = all.map_err(|error| self.failed("list", "addresses", error))?;
        let with_address: BTreeSet<u32> =
            all.iter().filter(|message| address_of(message).is_some()).map(|it| it.header.index).collect();
        let mut switches = Vec::new();
        for index in with_address {
            let Some(name) = self.by_index(index).await?.and_then(|link| link.name) else { continue };
            let switch = format!("{LINKS}/{name}/forwarding");
            if name.as_str() != LOOPBACK && !is_on(&switch)? {
                switches.push(switch);
            }
        }
        Ok(switches)
    }

    /// Returns the port's view of a link that is ours.
    async fn link(&self, seen: &Seen, master: Option<LinkName>) -> Result<Option<Link>, HostError> {
        let (Some(owner), Some(kind), Some(name)) = (seen.owner(self.scope()), seen.kind, seen.name.clone())
        else {
            return Ok(None);
        };
        let addresses = match kind {
            LinkKind::Bridge => self.addresses(seen.index).await?,
            LinkKind::Tap | LinkKind::Ifb => Vec::new(),
        };
        let is_in_group = master.as_ref().is_some_and(|bridge| seen.group == port_group(bridge));
        Ok(Some(Link {
            name,
            owner,
            kind,
            master,
            is_up: seen.is_up && (kind != LinkKind::Bridge || seen.group == BRIDGES),
            is_isolated: seen.is_isolated && is_in_group,
            addresses,
        }))
    }
}

impl Links for Netlink {
    async fn list(&self) -> Result<Vec<Link>, HostError> {
        let all = self.dump().await?;
        let names: BTreeMap<u32, &LinkName> =
            all.iter().filter_map(|seen| Some((seen.index, seen.name.as_ref()?))).collect();
        let mut links = Vec::new();
        for seen in all.iter().filter(|seen| seen.owner(self.scope()).is_some()) {
            let master = seen.master.and_then(|index| names.get(&index));
            links.extend(self.link(seen, master.map(|&name| name.clone())).await?);
        }
        Ok(links)
    }

    async fn inspect(&self, name: &LinkName) -> Result<Option<Link>, HostError> {
        let Some(seen) = self.get(name).await? else { return Ok(None) };
        let master = match seen.master {
            Some(index) => self.by_index(index).await?.and_then(|master| master.name),
            None => None,
        };
        self.link(&seen, master).await
    }

    async fn create(&self, plan: &LinkPlan) -> Result<(), HostError> {
        match self.get(&plan.name).await? {
            Some(seen) if seen.kind == Some(plan.kind) && seen.is_half_made(self.scope()) => {
                self.finish(&plan.name, seen.index, self.scope().alias(&plan.owner)).await
            }
            Some(seen)
                if seen.kind == Some(plan.kind) && seen.owner(self.scope()).as_ref() == Some(&plan.owner) =>
            {
                Ok(())
            }
            Some(_) => Err(not_ours("create link", &plan.name)),
            None => match plan.kind {
                LinkKind::Tap => self.create_tap(plan).await,
                LinkKind::Bridge => self.create_bridge(plan).await,
                LinkKind::Ifb => self.create_ifb(plan).await,
            },
        }
    }

    async fn change(&self, name: &LinkName, change: &LinkChange) -> Result<(), HostError> {
        let seen = self.ours("change link", name).await?;
        let index = seen.index;
        match change {
            LinkChange::Up => self.raise(name, &seen).await,
            LinkChange::Master(bridge) => self.enslave(name, index, bridge).await,
            LinkChange::Isolated => self.isolate(name, &seen).await,
            LinkChange::AddAddress(address) => self.add_address(name, index, *address).await,
            LinkChange::RemoveAddress(address) => self.remove_address(name, index, *address).await,
        }
    }

    async fn remove(&self, name: &LinkName) -> Result<(), HostError> {
        let Some(seen) = self.get(name).await? else { return Ok(()) };
        if seen.owner(self.scope()).is_none() && !seen.is_half_made(self.scope()) {
            return Err(not_ours("remove link", name));
        }
        // The link is removed by index, so that a new link of the same name is not affected.
        match self.0.removals.handle().link().del(seen.index).execute().await {
            Err(error) if errno(&error) == Some(ENODEV) => Ok(()),
            done => done.map_err(|error| self.0.removals.failed("remove link", name.as_str(), error)),
        }
    }

    async fn routes(&self) -> Result<Routes, HostError> {
        let request = self.handle().route().get(link_messages::main_table_ipv4());
        let all: Result<Vec<_>, _> = request.execute().try_collect().await;
        let all = all.map_err(|error| self.failed("list", "routes", error))?;
        Ok(link_messages::routes(&all, &self.dump().await?))
    }

    async fn forwarding(&self) -> Result<Forwarding, HostError> {
        if is_on(FORWARDING)? {
            return Ok(Forwarding::ByHost);
        }
        Ok(if self.links_that_do_not_forward().await?.is_empty() {
            Forwarding::ForGuests
        } else {
            Forwarding::Off
        })
    }

    async fn set_forwarding(&self) -> Result<(), HostError> {
        for switch in self.links_that_do_not_forward().await? {
            match fs::write(&switch, "1") {
                // The link disappeared meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                written => written.map_err(|error| HostError::io("write", switch, error))?,
            }
        }
        Ok(())
    }
}

/// Returns `true` if a switch is on. A removed link counts as on, because there is nothing to switch.
fn is_on(switch: &str) -> Result<bool, HostError> {
    match fs::read_to_string(switch) {
        Ok(text) => Ok(text.trim() != "0"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(HostError::io("read", switch, error)),
    }
}

fn not_ours(operation: &'static str, name: &LinkName) -> HostError {
    HostError::new(HostErrorKind::Conflict, operation, name.as_str())
        .because("a link of this name is not ours")
}

fn address_of(message: &AddressMessage) -> Option<Cidr> {
    if message.header.family != AddressFamily::Inet {
        return None;
    }
    let find =
        |pick: fn(&AddressAttribute) -> Option<std::net::IpAddr>| message.attributes.iter().find_map(pick);
    let local = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = local.or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    });
    match any? {
        std::net::IpAddr::V4(address) => Some(Cidr { address, prefix: message.header.prefix_len }),
        std::net::IpAddr::V6(_) => None,
    }
}
