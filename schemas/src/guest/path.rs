//! A path, or a part of a path, as a file system stores it: any bytes, mostly UTF-8.

use serde::{Deserialize, Serialize};

/// A path of any bytes; in JSON a string, or an array of numbers when the path is not UTF-8.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub struct BytePath(pub Vec<u8>);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    Text(String),
    Bytes(Vec<u8>),
}

impl BytePath {
    /// Returns the path as text when it is UTF-8.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// Returns a form for people: bytes that are not UTF-8 appear as `\xff`, so that different names look
    /// different.
    #[must_use]
    pub fn shown(&self) -> String {
        let mut shown = String::new();
        for chunk in self.0.utf8_chunks() {
            shown.push_str(chunk.valid());
            shown.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
        }
        shown
    }

    #[must_use]
    pub fn is_absolute(&self) -> bool {
        self.0.first() == Some(&b'/')
    }

    /// True if the path contains a NUL, which no valid path does.
    #[must_use]
    pub fn has_nul(&self) -> bool {
        self.0.contains(&0)
    }

    /// True if this is a single name that stays in its directory.
    #[must_use]
    pub fn is_plain_name(&self) -> bool {
        !matches!(&self.0[..], b"" | b"." | b"..") && !self.0.contains(&b'/')
    }
}

impl From<String> for BytePath {
    fn from(text: String) -> Self {
        Self(text.into_bytes())
    }
}

impl From<&str> for BytePath {
    fn from(text: &str) -> Self {
        text.to_owned().into()
    }
}

impl From<Form> for BytePath {
    fn from(form: Form) -> Self {
        match form {
            Form::Text(text) => text.into(),
            Form::Bytes(bytes) => Self(bytes),
        }
    }
}

impl From<BytePath> for Form {
    fn from(path: BytePath) -> Self {
        String::from_utf8(path.0).map_or_else(|error| Self::Bytes(error.into_bytes()), Self::Text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_survive_json(bytes in proptest::collection::vec(any::<u8>(), 0..32)) {
            let path = BytePath(bytes);
            let json = serde_json::to_string(&path).expect("JSON");
            prop_assert_eq!(serde_json::from_str::<BytePath>(&json).expect("read"), path);
        }
    }

    #[test]
    fn a_text_is_a_text_in_json_and_what_is_none_is_shown_byte_by_byte() {
        assert_eq!(serde_json::to_string(&BytePath::from("/a/né")).expect("JSON"), r#""/a/né""#);
        let odd = BytePath(b"b\xff\xc3\xa9\xfe".to_vec());
        assert_eq!((odd.text(), odd.shown()), (None, "b\\xffé\\xfe".to_owned()));
    }

    #[test]
    fn plain_names_stay_in_their_directory() {
        for (name, is_plain) in [
            (&b""[..], false),
            (b".", false),
            (b"..", false),
            (b"a/b", false),
            (b"...", true),
            (b"\xff", true),
        ] {
            assert_eq!(BytePath(name.to_vec()).is_plain_name(), is_plain, "{name:?}");
        }
    }
}
