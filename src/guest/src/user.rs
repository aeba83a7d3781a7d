//! The user of the program: the image's `user` value, looked up in the image's own files.

use std::fs;

/// Identity and home of the program's user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
}

/// Limit on the size of a file of the image that is read, in bytes. The image is not trusted.
const FILE_BYTES_MAX: usize = 1 << 20;

/// Reads `/etc/passwd` and `/etc/group` of the present root.
pub(crate) fn look_up(word: &str) -> Result<User, String> {
    let read = |path: &str| {
        let bytes = fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes[..bytes.len().min(FILE_BYTES_MAX)]).into_owned()
    };
    resolve(word, &read("/etc/passwd"), &read("/etc/group"))
}

/// Resolves `user`, `uid`, `user:group`, `uid:gid`, or an empty word for root.
fn resolve(word: &str, passwd: &str, group: &str) -> Result<User, String> {
    let (user, group_word) = match word.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (word, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        fields.len() >= 6 && (fields[0] == user || (user.parse::<u32>().is_ok() && fields[2] == user))
    });
    // The highest number is no id: the kernel takes it as "do not change", which would be root.
    let number = |text: &str| text.parse::<u32>().ok().filter(|&id| id != u32::MAX);
    let uid = entry.as_ref().and_then(|fields| number(fields[2])).or_else(|| number(user));
    let uid = uid.ok_or_else(|| format!("unable to find user {user}: no matching entry in /etc/passwd"))?;
    let name = entry.as_ref().map(|fields| fields[0]);
    let primary = match &entry {
        Some(fields) => number(fields[3]).ok_or_else(|| format!("the group of user {user} has no number"))?,
        None => 0,
    };
    let groups =
        || group.lines().map(|line| line.split(':').collect::<Vec<_>>()).filter(|fields| fields.len() >= 4);
    let gid = match group_word.filter(|word| !word.is_empty()) {
        None => primary,
        Some(word) => groups()
            .find(|fields| fields[0] == word)
            .and_then(|fields| number(fields[2]))
            .or_else(|| number(word))
            .ok_or_else(|| format!("unable to find group {word}: no matching entry in /etc/group"))?,
    };
    // An explicit group replaces the memberships, as in container runtimes.
    let memberships = groups()
        .filter(|fields| name.is_some_and(|name| fields[3].split(',').any(|listed| listed == name)))
        .filter_map(|fields| number(fields[2]));
    let groups =
        if group_word.is_some() { vec![gid] } else { std::iter::once(gid).chain(memberships).collect() };
    let home = entry.map_or("/", |fields| fields[5]);
    let home = if home.is_empty() { "/" } else { home };
    Ok(User { uid, gid, groups, home: home.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/false\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\ndisk:x:6:web,other\n";

    fn ids(word: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        resolve(word, PASSWD, GROUP).map(|user| (user.uid, user.gid, user.groups, user.home))
    }

    #[test]
    fn users_are_found_as_container_runtimes_find_them() {
        assert_eq!(ids(""), Ok((0, 0, vec![0], "/root".to_owned())));
        assert_eq!(ids("web"), Ok((33, 34, vec![34, 6], "/srv".to_owned())));
        assert_eq!(ids("33"), Ok((33, 34, vec![34, 6], "/srv".to_owned())));
        assert_eq!(ids("web:disk"), Ok((33, 6, vec![6], "/srv".to_owned())));
        assert_eq!(ids("1000:1001"), Ok((1000, 1001, vec![1001], "/".to_owned())));
        assert!(ids("nobody").is_err_and(|error| error.contains("nobody")));
        assert!(ids("web:nogroup").is_err());
    }

    #[test]
    fn a_number_that_is_no_id_is_refused_and_never_means_root() {
        for word in ["4294967295", "4294967295:0", "0:4294967295", "99999999999", "-1"] {
            assert!(ids(word).is_err(), "{word}");
        }
        assert_eq!(ids("4294967294:7").map(|(uid, gid, ..)| (uid, gid)), Ok((4_294_967_294, 7)));
        let resolved_in_image = |line: &str| resolve("app", &format!("{line}\n"), "app:x:4294967295:app\n");
        for line in ["app:x:4294967295:1:::", "app:x:1:4294967295:::", "app:x:1:x:::", "app:x:x:1:::"] {
            assert!(resolved_in_image(line).is_err(), "{line}");
        }
        assert_eq!(resolved_in_image("app:x:5:6:::").map(|user| (user.uid, user.groups)), Ok((5, vec![6])));
    }

    #[test]
    fn an_image_without_the_files_runs_as_root_or_by_number() {
        assert_eq!(resolve("", "", "").map(|user| user.uid), Ok(0));
        assert_eq!(resolve("7", "", "").map(|user| (user.uid, user.gid)), Ok((7, 0)));
    }
}
