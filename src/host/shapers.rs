//! Rules for the traffic of our links, by rtnetlink: the limiter at the root of what a link sends, and the filter that
//! leads what arrives at a link through another one.
//!
//! Guarantees: only links with this scope's mark are changed. Rules are recognised by [`MARK`]: it is the handle of a
//! limiter and the priority of a filter. A rule that is changed stays in force.
//! Never: caches the kernel's answers.
//! Cancel/crash: a dropped `divert` may leave no rule at all, or an empty hook for filters, which changes nothing.

use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute, TcFilterU32Option,
    TcHandle, TcMessage, TcMirrorActionType, TcOption, TcU32Key,
};
use stead_controllers::host::{Detour, HostError, Limit, Shapers, Shaping};
use stead_schemas::names::LinkName;
use stead_schemas::quantity::Rate;

use super::link_messages::Seen;
use super::netlink::Netlink;
use super::netlink_connection::{ENODEV, errno};
use super::tbf;

/// The number that marks our rules. The kernel and people number theirs from both ends.
const MARK: u16 = 0x5ead;
const LIMITER: TcHandle = TcHandle { major: MARK, minor: 0 };
/// Kind and handle of the hook for filters of what arrives at a link and of what it sends.
const HOOK_KIND: &str = "clsact";
const HOOK: TcHandle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
/// The part of the hook for what arrives.
const ARRIVALS: TcHandle = TcHandle { major: HOOK.major, minor: TcHandle::MIN_INGRESS };
/// Protocol number for frames of all protocols (`ETH_P_ALL`).
const ALL_PROTOCOLS: u16 = 3;

const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const EINVAL: i32 = 22;
/// Errors with which the kernel says that a rule, or the hook that it would be at, does not exist.
const NO_SUCH_RULE: [i32; 3] = [ENOENT, EINVAL, ENODEV];

impl Shapers for Netlink {
    async fn inspect(&self, link: &LinkName) -> Result<Shaping, HostError> {
        let seen = self.get(link).await?.filter(|seen| seen.owner(self.scope()).is_some());
        let Some(seen) = seen else { return Ok(Shaping::default()) };
        Ok(Shaping { limit: self.limit_of(link, &seen).await?, detour: self.detour_of(link, &seen).await? })
    }

    async fn limit(&self, link: &LinkName, rate: Rate) -> Result<(), HostError> {
        let mut message = about(&self.ours("limit link", link).await?);
        message.header.parent = TcHandle::ROOT;
        message.header.handle = LIMITER;
        message.attributes =
            vec![TcAttribute::Kind(tbf::KIND.to_owned()), TcAttribute::Options(tbf::options(rate))];
        let message = RouteNetlinkMessage::NewQueueDiscipline(message);
        let done = self.order(message, NLM_F_CREATE | NLM_F_REPLACE).await;
        done.map(drop).map_err(|error| self.failed("limit link", link.as_str(), error))
    }

    async fn unlimit(&self, link: &LinkName) -> Result<(), HostError> {
        let Some(seen) = self.ours_if_there("unlimit link", link).await? else { return Ok(()) };
        let mut message = about(&seen);
        message.header.parent = TcHandle::ROOT;
        // The kernel refuses to remove a root with another handle.
        message.header.handle = LIMITER;
        let message = RouteNetlinkMessage::DelQueueDiscipline(message);
        self.remove_rule("unlimit link", link, message).await
    }

    async fn divert(&self, link: &LinkName, through: &LinkName) -> Result<(), HostError> {
        let (seen, way) = (self.ours("divert link", link).await?, self.ours("divert link", through).await?);
        let failed = |error| self.failed("divert link", link.as_str(), error);
        let mut hook = about(&seen);
        hook.header.parent = TcHandle::CLSACT;
        hook.header.handle = HOOK;
        hook.attributes = vec![TcAttribute::Kind(HOOK_KIND.to_owned())];
        let hook = RouteNetlinkMessage::NewQueueDiscipline(hook);
        match self.order(hook, NLM_F_CREATE | NLM_F_EXCL).await {
            Err(error) if errno(&error) == Some(EEXIST) => {}
            done => drop(done.map_err(failed)?),
        }
        self.remove_filter("divert link", link, &seen).await?;
        let mut filters = self.handle().traffic_filter(seen.index.cast_signed());
        let filter = filters.add().ingress().priority(MARK).protocol(ALL_PROTOCOLS.to_be());
        filter.redirect(way.index).map_err(failed)?.execute().await.map_err(failed)
    }

    async fn undivert(&self, link: &LinkName) -> Result<(), HostError> {
        let Some(seen) = self.ours_if_there("undivert link", link).await? else { return Ok(()) };
        self.remove_filter("undivert link", link, &seen).await?;
        if self.filters(link, &seen).await?.is_empty() {
            let mut hook = about(&seen);
            hook.header.parent = TcHandle::CLSACT;
            hook.header.handle = HOOK;
            let hook = RouteNetlinkMessage::DelQueueDiscipline(hook);
            self.remove_rule("undivert link", link, hook).await?;
        }
        Ok(())
    }
}

impl Netlink {
    /// Sends a request that changes or reads one object. Returns the object that the kernel answers with, if any.
    async fn order(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Option<RouteNetlinkMessage>, rtnetlink::Error> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.handle().request(request)?;
        let mut found = None;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => found = Some(message),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(rtnetlink::Error::NetlinkError(error));
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// Returns the link of this name, or `None` if there is none. The error is Conflict if it is not ours.
    async fn ours_if_there(
        &self,
        operation: &'static str,
        link: &LinkName,
    ) -> Result<Option<Seen>, HostError> {
        match self.get(link).await? {
            Some(_) => self.ours(operation, link).await.map(Some),
            None => Ok(None),
        }
    }

    async fn remove_rule(
        &self,
        operation: &'static str,
        link: &LinkName,
        message: RouteNetlinkMessage,
    ) -> Result<(), HostError> {
        match self.order(message, 0).await {
            Err(error) if errno(&error).is_some_and(|errno| NO_SUCH_RULE.contains(&errno)) => Ok(()),
            done => done.map(drop).map_err(|error| self.failed(operation, link.as_str(), error)),
        }
    }

    async fn remove_filter(
        &self,
        operation: &'static str,
        link: &LinkName,
        seen: &Seen,
    ) -> Result<(), HostError> {
        let mut message = about(seen);
        message.header.parent = ARRIVALS;
        message.header.info = TcHandle { major: MARK, minor: 0 }.into();
        self.remove_rule(operation, link, RouteNetlinkMessage::DelTrafficFilter(message)).await
    }

    async fn limit_of(&self, link: &LinkName, seen: &Seen) -> Result<Limit, HostError> {
        // The message about the link names the kind, which saves a request for most links.
        if seen.qdisc.as_deref() != Some(tbf::KIND) {
            return Ok(Limit::None);
        }
        let mut message = about(seen);
        message.header.parent = TcHandle::ROOT;
        // Older kernels answer the sender only if it asks for an echo.
        match self.order(RouteNetlinkMessage::GetQueueDiscipline(message), NLM_F_ECHO).await {
            Ok(Some(RouteNetlinkMessage::NewQueueDiscipline(found))) => Ok(limit(&found)),
            Ok(_) => Ok(Limit::None),
            Err(error) if errno(&error).is_some_and(|errno| NO_SUCH_RULE.contains(&errno)) => Ok(Limit::None),
            Err(error) => Err(self.failed("inspect the limit of link", link.as_str(), error)),
        }
    }

    async fn detour_of(&self, link: &LinkName, seen: &Seen) -> Result<Detour, HostError> {
        let filters = self.handle().traffic_filter(seen.index.cast_signed()).get().ingress().execute();
        let found: Result<Vec<TcMessage>, _> = filters.try_collect().await;
        let found = found.map_err(|error| self.failed("list the filters of link", link.as_str(), error))?;
        let ours = found.iter().filter(|filter| TcHandle::from(filter.header.info).major == MARK);
        // The kernel lists a filter itself and its tables too, which have no destination.
        let ours: Vec<&[TcOption]> = ours.filter_map(options).filter(|options| is_rule(options)).collect();
        let [rule] = ours[..] else {
            return Ok(if ours.is_empty() { Detour::None } else { Detour::Broken });
        };
        let way = match destination(rule) {
            Some(index) => self.by_index(index).await?.and_then(|way| way.name),
            None => None,
        };
        Ok(way.map_or(Detour::Broken, Detour::Through))
    }

    /// Returns all filters of what arrives at a link and of what it sends, ours and foreign.
    async fn filters(&self, link: &LinkName, seen: &Seen) -> Result<Vec<TcMessage>, HostError> {
        let mut filters = self.handle().traffic_filter(seen.index.cast_signed());
        let mut all = Vec::new();
        for request in [filters.get().ingress(), filters.get().egress()] {
            let found: Result<Vec<TcMessage>, _> = request.execute().try_collect().await;
            let failed = |error| self.failed("list the filters of link", link.as_str(), error);
            all.extend(found.map_err(failed)?);
        }
        Ok(all)
    }
}

fn about(seen: &Seen) -> TcMessage {
    TcMessage::with_index(seen.index.cast_signed())
}

/// Returns the limit that a queueing discipline is.
fn limit(message: &TcMessage) -> Limit {
    if message.header.handle != LIMITER {
        return Limit::None;
    }
    options(message).and_then(tbf::rate).map_or(Limit::Altered, Limit::At)
}

fn options(message: &TcMessage) -> Option<&[TcOption]> {
    message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options.as_slice()),
        _ => None,
    })
}

/// Returns `true` if a filter's options are of a rule for frames, rather than of its table.
fn is_rule(options: &[TcOption]) -> bool {
    !options.iter().any(|option| matches!(option, TcOption::U32(TcFilterU32Option::Divisor(_))))
}

/// Returns the index of the link that a filter leads all frames through, or `None` if it is not as we make it.
fn destination(options: &[TcOption]) -> Option<u32> {
    let (mut takes_all, mut to) = (false, None);
    for option in options {
        match option {
            TcOption::U32(TcFilterU32Option::Selector(selector)) => {
                takes_all = selector.keys.iter().all(|key| key.mask == TcU32Key::default().mask);
            }
            TcOption::U32(TcFilterU32Option::Action(actions)) => {
                let [action] = &actions[..] else { return None };
                to = action.attributes.iter().find_map(redirected_to);
            }
            _ => {}
        }
    }
    to.filter(|&index| takes_all && index > 0)
}

fn redirected_to(attribute: &TcActionAttribute) -> Option<u32> {
    let TcActionAttribute::Options(options) = attribute else { return None };
    options.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => {
            let is_redirect = mirror.eaction == TcMirrorActionType::EgressRedir
                && mirror.generic.action == TcActionType::Stolen;
            is_redirect.then_some(mirror.ifindex)
        }
        _ => None,
    })
}
