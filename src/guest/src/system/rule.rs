//! The rule for which programs are an init: they run as PID 1 of the guest, all others as children of our PID 1.
//!
//! | what the instance names                                             | it runs as          |
//! |---------------------------------------------------------------------|---------------------|
//! | `systemd` or `init`, and the file behind all links is `systemd`     | PID 1, systemd      |
//! | `/sbin/init`, `/usr/sbin/init`, `/bin/init`, `/usr/bin/init`        | PID 1, another init |
//! | another `init` which is the same file as `/sbin/init`               | PID 1, another init |
//! | anything else, an `init` elsewhere included: somebody's own program | an ordinary program |
//! | any of them, as another user than root                              | an ordinary program |
//!
//! A name without a slash is looked up in `PATH` first.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stead_schemas::guest::Config;

use crate::program;
use crate::user;

/// Paths at which an init is by convention, even if they are links.
const INIT_PATHS: [&str; 4] = ["/sbin/init", "/usr/sbin/init", "/bin/init", "/usr/bin/init"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Kind {
    Systemd,
    Other,
}

/// An init of the image.
#[derive(Debug)]
pub(crate) struct Init {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// Finds the init in the present root.
pub(super) fn find(config: &Config) -> Option<Init> {
    let user = user::look_up(&config.user).ok().filter(|user| user.uid == 0)?;
    let word = config.argv.first()?;
    let path = if word.contains('/') {
        Some(PathBuf::from(word)).filter(|path| path.is_absolute())
    } else {
        let environment = program::environment(config, &user);
        let (_, path) = environment.into_iter().find(|(key, _)| key == "PATH")?;
        search(word, &path)
    };
    let path = path.filter(|path| is_program(path))?;
    let real = fs::canonicalize(&path).ok()?;
    let kind = kind(&path, &real, fs::canonicalize("/sbin/init").ok().as_deref())?;
    Some(Init { path, kind })
}

/// Searches a command as a shell does.
pub(super) fn search(word: &str, path: &str) -> Option<PathBuf> {
    let directories = path.split(':').map(Path::new).filter(|directory| directory.is_absolute());
    directories.map(|directory| directory.join(word)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns the kind of init. `real` and `usual` are the targets of `path` and `/sbin/init` behind all links.
fn kind(path: &Path, real: &Path, usual: Option<&Path>) -> Option<Kind> {
    let is_named = |path: &Path, name: &str| path.file_name().is_some_and(|last| last == name);
    let is_init = is_named(path, "init");
    if is_named(real, "systemd") && (is_init || is_named(path, "systemd")) {
        return Some(Kind::Systemd);
    }
    let is_in_place = INIT_PATHS.iter().any(|directory| path == Path::new(directory));
    (is_init && (is_in_place || usual == Some(real))).then_some(Kind::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SYSTEMD: &str = "/usr/lib/systemd/systemd";

    #[test]
    fn what_is_an_init_and_of_which_kind() {
        for (path, real, usual, expected) in [
            ("/sbin/init", SYSTEMD, Some(SYSTEMD), Some(Kind::Systemd)),
            ("/lib/systemd/systemd", SYSTEMD, Some(SYSTEMD), Some(Kind::Systemd)),
            ("/usr/lib/systemd/systemd", SYSTEMD, None, Some(Kind::Systemd)),
            ("/bin/systemd", SYSTEMD, None, Some(Kind::Systemd)),
            (
                "/nix/store/abc-systemd/lib/systemd/systemd",
                "/nix/store/abc-systemd/lib/systemd/systemd",
                None,
                Some(Kind::Systemd),
            ),
            ("/init", SYSTEMD, None, Some(Kind::Systemd)),
            ("/sbin/init", "/bin/busybox", Some("/bin/busybox"), Some(Kind::Other)),
            ("/sbin/init", "/sbin/init", Some("/sbin/init"), Some(Kind::Other)),
            ("/bin/init", "/bin/busybox", None, Some(Kind::Other)),
            ("/init", "/sbin/init", Some("/sbin/init"), Some(Kind::Other)),
            // These are a user's own programs.
            ("/init", "/init", Some("/bin/busybox"), None),
            ("/app/init", "/app/init", None, None),
            ("/app/systemd", "/app/program", None, None),
            ("/usr/bin/systemctl", "/usr/bin/systemctl", None, None),
            ("/app/run", SYSTEMD, Some(SYSTEMD), None),
            ("/bin/sh", "/bin/busybox", Some("/bin/busybox"), None),
            ("/sbin/initialise", "/sbin/initialise", None, None),
        ] {
            assert_eq!(
                kind(Path::new(path), Path::new(real), usual.map(Path::new)),
                expected,
                "{path} -> {real}"
            );
        }
    }

    #[test]
    fn a_word_is_found_in_the_path_as_shells_do() {
        assert_eq!(search("sh", "/no/such:relative:/bin"), Some(PathBuf::from("/bin/sh")));
        assert_eq!(search("sh", ""), None);
        assert_eq!(search("passwd", "/etc"), None, "it cannot be executed");
    }
}
