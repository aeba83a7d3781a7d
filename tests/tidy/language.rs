//! Rules on the language of code and comments that keep them plain English.

use std::collections::BTreeSet;

use super::{Source, code, none, sources};

/// First words of doc comments that begin with a fragment instead of a subject or a verb.
const FRAGMENTS: &str = "Of What One Ones Likewise Whose Nobody Who Whoever Whom That Those Which Where Whether When \
    Whatever How Not Only Also Besides As By Before After Until Since For From To In On At With Without Under Over \
    Else Same Another Other Others Every Each Both None Nothing Somebody Something Anything Everything Everybody It \
    Its His They Their There Here Then Still Once Never Always Too Why While If Unless And Or But So";

/// The first word of each doc comment, with its line number.
fn first_words(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut was_comment = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        let line = line.trim_start();
        let comment = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        let is_first = comment.is_some() && !was_comment;
        was_comment = comment.is_some();
        let word = comment.filter(|_| is_first)?.split_whitespace().next()?;
        Some((at + 1, word.trim_end_matches([',', ':', ';', '.'])))
    })
}

fn fragments(sources: &[Source]) -> Vec<String> {
    let refused: BTreeSet<&str> = FRAGMENTS.split_whitespace().collect();
    let found = |source: &Source| {
        first_words(&source.text)
            .filter(|(_, word)| refused.contains(word))
            .map(|(at, word)| format!("{}:{at} begins with {word:?}", source.path))
            .collect::<Vec<_>>()
    };
    sources.iter().flat_map(found).collect()
}

#[test]
fn doc_comments_begin_with_a_subject_or_a_verb() {
    none(fragments(&sources()));
}

#[test]
fn a_fragment_is_found_at_the_beginning_of_a_comment_only() {
    let text = "/// Of a thing.\n/// That is all.\nfn a() {}\n\n/// Returns what it is.\n/// Of it.\nfn b() {}\n//! What\n";
    let source = Source { path: "x.rs".to_owned(), text: text.to_owned() };
    assert_eq!(fragments(&[source]), ["x.rs:1 begins with \"Of\"", "x.rs:8 begins with \"What\""]);
}

#[test]
fn bindings_are_named_by_what_they_are() {
    let prefixes = ["let ", "let mut ", "|"].map(|before| format!("{before}of_"));
    let is_binding = |line: &str| prefixes.iter().any(|prefix| line.contains(prefix.as_str()));
    let all = sources();
    let found = all.iter().flat_map(|source| {
        code(&source.text)
            .filter(|(_, line)| is_binding(line))
            .map(|(at, line)| format!("{}:{at} {}", source.path, line.trim()))
            .collect::<Vec<_>>()
    });
    none(found.collect());
}

#[test]
fn numbers_of_different_meaning_have_types_of_their_own() {
    let untyped = ["generation: u64", "run: u64", "standby: u64", "launch: u64"];
    let is_field = |line: &str, name: &str| {
        line.trim_start().trim_start_matches("pub ").trim_start_matches("pub(super) ").starts_with(name)
    };
    let all = sources();
    let found = all.iter().filter(|source| !source.path.starts_with("tests/")).flat_map(|source| {
        code(&source.text)
            .filter(|(_, line)| untyped.iter().any(|name| is_field(line, name)))
            .map(|(at, line)| format!("{}:{at} {}", source.path, line.trim()))
            .collect::<Vec<_>>()
    });
    none(found.collect());
}

/// Words of an earlier vocabulary; the design of the tree names the standard term for each.
const REPLACED: &str = "wish wishes wished shall told said knock knocks door doors board boards packed whoever \
    member members loose stranger strangers tend";

/// The words of comments and documents, with their line numbers.
fn prose(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let is_document = source.path.ends_with(".md");
    source
        .text
        .lines()
        .enumerate()
        .filter_map(move |(at, line)| {
            let prose = if is_document { Some(line) } else { line.trim_start().strip_prefix("//") };
            // Names in code spans are those of the code.
            let words =
                prose?.split('`').step_by(2).flat_map(|part| part.split(|c: char| !c.is_alphanumeric()));
            Some(words.map(move |word| (at + 1, word)).collect::<Vec<_>>())
        })
        .flatten()
}

#[test]
fn comments_and_documents_use_one_vocabulary() {
    let refused: BTreeSet<&str> = REPLACED.split_whitespace().collect();
    let mut all = sources();
    for dir in ["deploy", "controllers", "tests"] {
        super::files_below(&super::root().join(dir), ".md", &mut all);
    }
    let readme = std::fs::read_to_string(super::root().join("README.md")).expect("it is there");
    all.push(Source { path: "README.md".to_owned(), text: readme });
    let found = all.iter().flat_map(|source| {
        prose(source)
            .filter(|(_, word)| refused.contains(word))
            .map(|(at, word)| format!("{}:{at} has the word {word:?}", source.path))
            .collect::<Vec<_>>()
    });
    none(found.collect());
}

/// Words of the earlier vocabulary that identifiers and file names do not contain either.
const REPLACED_IN_NAMES: &str = "wish wishes wished shall told said say says tell tells telling hear heard hears look \
    looks looked door doors knock knocks knocked knocking member members board boards packed packing turn turns place \
    places placed become becomes assume assumed assuming tend tended loose stranger strangers remark remarks judge \
    judges";

/// Names that keep such a word: standard terms (to look up, in place), and names of other crates.
const KEPT: &[&str] = &["look_up", "in_place", "InPlace"];

/// The words of a name in snake case or camel case, in lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = '_';
    for letter in name.chars() {
        if letter == '_' || (letter.is_uppercase() && before.is_lowercase()) {
            words.push(String::new());
        }
        if let (true, Some(word)) = (letter.is_alphanumeric(), words.last_mut()) {
            word.extend(letter.to_lowercase());
        }
        before = letter;
    }
    words
}

/// A line without the quotation marks that begin or end no string.
fn without_marks(line: &str) -> String {
    line.replace("\\\"", "").replace("'\"'", "")
}

/// A line of code without the contents of its string literals.
fn without_strings(line: &str) -> String {
    without_marks(line).split('"').step_by(2).collect::<Vec<_>>().join(" ")
}

/// The source without the contents of its raw string literals; its lines keep their numbers.
fn without_raw_strings(text: &str) -> String {
    let mut parts = text.split("r#\"");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (content, rest) = part.split_once("\"#").unwrap_or((part, ""));
        out.extend(std::iter::repeat_n('\n', content.matches('\n').count()));
        out.push_str(rest);
    }
    out
}

/// True if a name contains a word of the earlier vocabulary.
fn is_replaced(name: &str, refused: &BTreeSet<&str>) -> bool {
    let name = KEPT.iter().fold(name.to_owned(), |name, kept| name.replace(kept, ""));
    words(&name).iter().any(|word| refused.contains(word.as_str()))
}

/// The names in a source, its path included, that contain a word of the earlier vocabulary.
fn replaced_names(source: &Source) -> Vec<String> {
    let refused: BTreeSet<&str> = REPLACED_IN_NAMES.split_whitespace().collect();
    let is_part = |c: char| !c.is_alphanumeric() && c != '_';
    let in_path = source.path.split(is_part).filter(|name| is_replaced(name, &refused));
    let mut found: Vec<String> =
        in_path.map(|name| format!("{}: the file's name has {name}", source.path)).collect();
    let mut is_text = false;
    for (at, line) in code(&without_raw_strings(&source.text)) {
        // The lines of a string over several lines are text.
        let was_text = is_text;
        is_text ^= without_marks(line).matches('"').count() % 2 == 1;
        if !was_text {
            let line = without_strings(line.split(" // ").next().unwrap_or_default());
            let names = line.split(is_part).filter(|name| is_replaced(name, &refused));
            found.extend(names.map(|name| format!("{}:{at} {name}", source.path)));
        }
    }
    found
}

#[test]
fn names_use_one_vocabulary() {
    let own = "tests/tidy/language.rs";
    none(sources().iter().filter(|source| source.path != own).flat_map(replaced_names).collect());
}

#[test]
fn a_replaced_word_is_found_in_names_and_paths_and_not_in_text() {
    let text = "fn is_told() {}\nlet look = look_up(TapDoors, \"told\");\n// A told word.\n\"a text\n of wish\"\nlet wish = 1;\nlet x = r#\"\n{\"told\":\n\"#;\n";
    let source = Source { path: "src/doors.rs".to_owned(), text: text.to_owned() };
    let found = ["src/doors.rs: the file's name has doors", "src/doors.rs:1 is_told", "src/doors.rs:2 look"];
    let more = ["src/doors.rs:2 TapDoors", "src/doors.rs:6 wish"];
    assert_eq!(replaced_names(&source), [&found[..], &more[..]].concat());
}
