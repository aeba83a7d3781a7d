//! The default environment of a systemd's units: the variables of mediated egress.
//!
//! A systemd does not hand its own environment on to its units. A drop-in of its configuration gives it one for them.
//! Guarantees: nothing is written into the image's directories, `/run` is memory. The first number among drop-ins lets
//! those of the image override ours.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

/// Directory of drop-ins, see systemd-system.conf(5).
const DIRECTORY: &str = "/run/systemd/system.conf.d";
const FILE: &str = "00-stead-egress.conf";

/// Writes the drop-in before the init is executed. Without variables nothing is written.
pub(super) fn write(variables: &[(String, String)]) -> io::Result<()> {
    write_below(Path::new("/"), variables)
}

fn write_below(root: &Path, variables: &[(String, String)]) -> io::Result<()> {
    let Some(text) = text(variables) else { return Ok(()) };
    let directory = root.join(DIRECTORY.trim_start_matches('/'));
    DirBuilder::new().recursive(true).mode(0o755).create(&directory)?;
    let path = directory.join(FILE);
    fs::write(&path, text)?;
    fs::set_permissions(&path, Permissions::from_mode(0o644))
}

/// Returns the text of the drop-in. A variable that would need an escape is left out: versions of systemd differ in
/// which ones they know, and none of ours needs one. Quotes keep the words of a value together in all versions.
fn text(variables: &[(String, String)]) -> Option<String> {
    let is_plain =
        |text: &str| text.bytes().all(|byte| matches!(byte, b' '..=b'~') && !b"\"'\\%$".contains(&byte));
    let words: Vec<String> = variables
        .iter()
        .filter(|(key, value)| is_plain(key) && is_plain(value))
        .map(|(key, value)| format!("\"{key}={value}\""))
        .collect();
    (!words.is_empty()).then(|| format!("[Manager]\nDefaultEnvironment={}\n", words.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn units_get_the_variables_by_a_drop_in_that_anybody_may_read() {
        let root = tempfile::tempdir().expect("made");
        let given =
            variables(&[("HTTP_PROXY", "http://10.100.0.1:18080"), ("JDK_JAVA_OPTIONS", "-Da=b -Dc=d")]);
        write_below(root.path(), &given).expect("written");
        let path = root.path().join("run/systemd/system.conf.d/00-stead-egress.conf");
        assert_eq!(
            fs::read_to_string(&path).expect("read"),
            "[Manager]\nDefaultEnvironment=\"HTTP_PROXY=http://10.100.0.1:18080\" \"JDK_JAVA_OPTIONS=-Da=b -Dc=d\"\n"
        );
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o644);
    }

    #[test]
    fn without_variables_there_is_no_drop_in() {
        let root = tempfile::tempdir().expect("made");
        write_below(root.path(), &[]).expect("nothing to write");
        assert_eq!(fs::read_dir(root.path()).expect("read").count(), 0);
    }

    #[test]
    fn a_value_cannot_add_settings_of_its_own() {
        for value in ["a\nShowStatus=yes", "a\tb", "\"", "'", "\\", "%H", "$HOME", "\u{e9}", "\0"] {
            assert_eq!(text(&variables(&[("KEY", value)])), None, "{value:?}");
            let kept = text(&variables(&[("KEY", value), ("OTHER", "1")]));
            assert_eq!(kept.as_deref(), Some("[Manager]\nDefaultEnvironment=\"OTHER=1\"\n"), "{value:?}");
        }
    }
}
