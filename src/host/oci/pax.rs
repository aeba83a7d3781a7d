//! Records of extended headers (pax), split by their lengths.
//!
//! The tar crate splits the records at newlines, which values may contain: a file capability or an attribute would
//! then be malformed, or smuggle in a record of its own.

use super::Refused;

/// Calls `take` with the key and value of each record: `LENGTH KEY=VALUE\n`.
pub(super) fn records<'a>(
    mut bytes: &'a [u8],
    mut take: impl FnMut(&'a [u8], &'a [u8]) -> Result<(), Refused>,
) -> Result<(), Refused> {
    // Some writers fill the block up with NUL.
    while let Some(first) = bytes.first().filter(|first| **first != 0) {
        let malformed = || Refused::new("the archive is broken: an extended header is malformed");
        if !first.is_ascii_digit() {
            return Err(malformed());
        }
        let space = bytes.iter().position(|&byte| byte == b' ').ok_or_else(malformed)?;
        let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok());
        let length = length.filter(|length| *length > space + 1).ok_or_else(malformed)?;
        let record = bytes.get(space + 1..length).ok_or_else(malformed)?;
        let record = record.strip_suffix(b"\n").ok_or_else(malformed)?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or_else(malformed)?;
        take(&record[..equals], &record[equals + 1..])?;
        bytes = &bytes[length..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Refused> {
        let mut found = Vec::new();
        records(bytes, |key, value| {
            found.push((String::from_utf8_lossy(key).into_owned(), value.to_vec()));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn values_may_hold_newlines_equals_signs_and_nothing() {
        let found = all(b"13 a=x\n9 b=y\n12 path=p=q\n5 c=\n\0\0").expect("well formed");
        let expected: [(&str, &[u8]); 3] = [("a", b"x\n9 b=y"), ("path", b"p=q"), ("c", b"")];
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value.to_vec())));
    }

    #[test]
    fn records_that_lie_about_their_length_are_refused() {
        for bytes in [
            &b"99 a=b\n"[..],
            b"7 a=b\n",
            b"3 \n",
            b"0 a=b\n",
            b"a=b\n",
            b"6 abc\n",
            b"18446744073709551616 a=b\n",
        ] {
            assert!(all(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
