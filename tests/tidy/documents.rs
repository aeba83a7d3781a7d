//! Rules for the documents: paths that exist, lengths, and short sentences on the first page.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Source, none, root};

/// Folders of the tree. A word that begins with such a folder is a path from the root.
const FOLDERS: [&str; 7] =
    ["schemas/", "controllers/", "src/", "tests/", "deploy/", "proptest-regressions/", ".ci/"];
/// File name extensions. A name without a folder can only mean a file beside the document or at the root.
const FILE_ENDINGS: [&str; 3] = [".md", ".rs", ".toml"];
/// Limit on the lines of the first page, which a newcomer reads to its end.
const FIRST_PAGE_LINES_MAX: usize = 200;
/// Limit on the lines of a document. A longer one holds more than one idea.
const DOCUMENT_LINES_MAX: usize = 500;
/// Limit on the words of a sentence that is understood at the first reading.
const SENTENCE_WORDS_MAX: usize = 25;

/// Lists all documents of the tree, except those in the build's own folders.
fn documents() -> Vec<Source> {
    let mut folders = vec![root()];
    let mut paths = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder is read").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && name != ".git" {
                folders.push(path);
            } else if name.ends_with(".md") {
                paths.push(path);
            }
        }
    }
    paths.sort();
    let read = |path: PathBuf| Source {
        text: fs::read_to_string(&path).expect("documents are UTF-8"),
        path: path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned(),
    };
    paths.into_iter().map(read).collect()
}

/// Returns the words of a document that can name a file, with their line numbers: everything in backticks or in a
/// fenced block, and the targets of links.
fn words_that_can_be_paths(text: &str) -> Vec<(usize, String)> {
    let mut is_fenced = false;
    let mut words = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
            continue;
        }
        let code: Vec<&str> =
            if is_fenced { vec![line] } else { line.split('`').skip(1).step_by(2).collect() };
        // Relative names in an example are on the reader's disk.
        let local =
            code.iter().flat_map(|code| code.split_whitespace()).filter(|word| !word.starts_with("./"));
        words.extend(local.map(|word| (at + 1, word.to_owned())));
        if !is_fenced {
            let targets = line.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
            let local = targets.filter(|target| !target.is_empty() && !target.contains("://"));
            words.extend(local.map(|target| (at + 1, format!("./{target}"))));
        }
    }
    words
}

/// Returns the paths that a document names, each with its line and its possible positions on disk.
fn paths_named(document: &Source) -> Vec<(usize, String, Vec<PathBuf>)> {
    let beside = root().join(&document.path);
    let beside = beside.parent().unwrap_or(Path::new("/"));
    let mut paths = Vec::new();
    for (line, word) in words_that_can_be_paths(&document.text) {
        let word = word.trim_matches(['"', '\'', ',', ';', '(', ')', '`']).trim_end_matches(['.', ':']);
        let path = word.split(':').next().unwrap_or(word);
        let is_file_name = !path.contains('/') && FILE_ENDINGS.iter().any(|ending| path.ends_with(ending));
        if path.contains(['*', '<', '$', '{']) {
            continue;
        }
        if path.starts_with("./") {
            paths.push((line, path.to_owned(), vec![beside.join(path)]));
        } else if FOLDERS.iter().any(|folder| path.starts_with(folder)) {
            paths.push((line, path.to_owned(), vec![root().join(path)]));
        } else if is_file_name {
            paths.push((line, path.to_owned(), vec![root().join(path), beside.join(path)]));
        }
    }
    paths
}

/// Returns the sentences of a document with the number of the line where each ends. A fenced block is no sentence; a
/// table cell, a heading and a list item end theirs. Text in backticks counts as one word.
fn sentences(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut sentence = String::new();
    let (mut is_fenced, mut is_code) = (false, false);
    let mut end = |at: usize, sentence: &mut String| {
        let text = std::mem::take(sentence);
        if !text.trim().is_empty() {
            found.push((at, text.split_whitespace().collect::<Vec<_>>().join(" ")));
        }
    };
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.starts_with("```") {
            is_fenced = !is_fenced;
            end(at, &mut sentence);
            continue;
        }
        if is_fenced {
            continue;
        }
        if line.is_empty() || line.starts_with(['#', '|', '-', '*']) {
            end(at, &mut sentence);
        }
        let mut characters = line.chars().peekable();
        while let Some(character) = characters.next() {
            let is_last = characters.peek().is_none_or(|next| next.is_whitespace());
            match character {
                '`' => {
                    is_code = !is_code;
                    sentence.push(if is_code { '`' } else { ' ' });
                    if is_code {
                        sentence.push('c');
                    }
                }
                _ if is_code => {}
                '|' => end(at + 1, &mut sentence),
                '.' | '!' | '?' if is_last => {
                    sentence.push(character);
                    end(at + 1, &mut sentence);
                }
                _ => sentence.push(character),
            }
        }
        sentence.push(' ');
    }
    end(text.lines().count(), &mut sentence);
    found
}

/// Returns the number of words, which contain a letter or a digit.
fn words(sentence: &str) -> usize {
    sentence.split_whitespace().filter(|word| word.chars().any(char::is_alphanumeric)).count()
}

#[test]
fn documents_name_files_that_exist() {
    let documents = documents();
    assert!(documents.iter().any(|document| document.path == "README.md"), "the documents were not found");
    let mut findings = Vec::new();
    let mut named = 0;
    for document in &documents {
        for (line, path, candidates) in paths_named(document) {
            named += 1;
            if !candidates.iter().any(|candidate| candidate.exists()) {
                findings.push(format!("{}:{line} names {path}, which does not exist", document.path));
            }
        }
    }
    assert!(named > 50, "only {named} paths were recognised");
    none(findings);
}

#[test]
fn documents_are_short() {
    let findings = documents().into_iter().filter_map(|document| {
        let lines = document.text.lines().count();
        let max = if document.path == "README.md" { FIRST_PAGE_LINES_MAX } else { DOCUMENT_LINES_MAX };
        (lines > max).then(|| format!("{} has {lines} lines; {max} are allowed", document.path))
    });
    none(findings.collect());
}

#[test]
fn sentences_of_the_first_page_are_short() {
    let text = fs::read_to_string(root().join("README.md")).expect("read");
    let sentences = sentences(&text);
    assert!(sentences.len() > 20, "only {} sentences were recognised", sentences.len());
    let findings = sentences.into_iter().filter_map(|(line, sentence)| {
        let words = words(&sentence);
        (words > SENTENCE_WORDS_MAX).then(|| format!("README.md:{line} has {words} words: {sentence}"))
    });
    none(findings.collect());
}

/// Returns the names of the fields of the configuration.
fn configuration_keys(source: &str) -> Vec<&str> {
    let body = source.split_once("pub struct Config {").map_or("", |(_, rest)| rest);
    let body = body.split_once("\n}").map_or("", |(body, _)| body);
    body.lines().filter_map(|line| line.strip_prefix("    pub ")?.split(':').next()).collect()
}

/// Returns the names in the first column of the tables of configuration keys.
fn keys_described(document: &str) -> Vec<&str> {
    let keys = document.split("## The command line").next().unwrap_or("");
    keys.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect()
}

#[test]
fn every_configuration_key_is_described_once() {
    let source = fs::read_to_string(root().join("src/config.rs")).expect("read");
    let document = fs::read_to_string(root().join("deploy/configuration.md")).expect("read");
    let (mut keys, mut described) = (configuration_keys(&source), keys_described(&document));
    assert!(keys.len() > 20, "only {} keys were recognised", keys.len());
    keys.sort_unstable();
    described.sort_unstable();
    assert_eq!(keys, described, "on the left the keys of src/config.rs, on the right those of the document");
}

#[test]
fn sentences_end_where_a_reader_stops() {
    let text = "# A title\n\nOne two\nthree. Four `five six` 7.5, seven!\n\n```\nno sentence here.\n```\n\
                - an item\n- another\n\n| a cell | b |\n";
    let counts: Vec<usize> = sentences(text).iter().map(|(_, sentence)| words(sentence)).collect();
    assert_eq!(counts, [2, 3, 4, 2, 1, 2, 1]);
}

#[test]
fn paths_are_recognised_wherever_a_document_has_them() {
    let text = "See `src/none.rs`, [a page](none.md#part), `none.toml` and [this](https://example.invalid/x.md).\n\
                ```\n$ deploy/none ARGUMENT\n```\n`/etc/stead.yaml` and `tests/*.rs` are none of the tree.\n";
    let document = Source { path: "README.md".to_owned(), text: text.to_owned() };
    let named: Vec<(usize, String)> =
        paths_named(&document).into_iter().map(|(line, path, _)| (line, path)).collect();
    let expected = [(1, "src/none.rs"), (1, "none.toml"), (1, "./none.md"), (3, "deploy/none")];
    assert_eq!(named, expected.map(|(line, path)| (line, path.to_owned())));
}
