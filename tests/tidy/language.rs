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
