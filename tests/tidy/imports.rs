//! Rule for imports: the files of a crate import each other in no circle, except a `mod.rs` and the files below it.

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, none, sources};

/// Folders of crates, each with all its files. A file belongs to the longest folder that it is in.
const CRATES: [&str; 13] = [
    "schemas/src/",
    "controllers/src/",
    "src/",
    "src/egress/src/",
    "src/egress/tests/names/",
    "src/egress/tests/process/",
    "src/egress/tests/proxy/",
    "src/guest/src/",
    "tests/it/",
    "tests/host/",
    "tests/sim/",
    "tests/e2e/",
    "tests/bench/src/",
];

/// Returns the folder of the crate that a file belongs to.
fn crate_of(path: &str) -> Option<&'static str> {
    CRATES.into_iter().filter(|folder| path.starts_with(folder)).max_by_key(|folder| folder.len())
}

/// Returns the words of a file's module path, from the root of its crate.
fn module<'a>(path: &'a str, folder: &str) -> Vec<&'a str> {
    let mut words: Vec<&str> = path[folder.len()..].trim_end_matches(".rs").split('/').collect();
    if words.last().is_some_and(|last| *last == "mod") || matches!(words.as_slice(), ["lib" | "main"]) {
        words.pop();
    }
    words
}

/// Returns the file with a module path, or with the longest beginning of it.
fn file_of(folder: &str, words: &[&str], files: &BTreeSet<&str>) -> Option<String> {
    (1..=words.len()).rev().find_map(|length| {
        let stem = format!("{folder}{}", words[..length].join("/"));
        [format!("{stem}.rs"), format!("{stem}/mod.rs")]
            .into_iter()
            .find(|path| files.contains(path.as_str()))
    })
}

/// The code of a file without comments and without its own test module, whose imports concern only tests.
fn program(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let is_test = |at: usize| {
        lines[at] == "#[cfg(test)]"
            && lines.get(at + 1).is_some_and(|next| next.contains("mod ") && next.ends_with('{'))
    };
    let end = (0..lines.len()).find(|&at| is_test(at)).unwrap_or(lines.len());
    let code = lines[..end].iter().filter(|line| !line.trim_start().starts_with("//"));
    code.copied().collect::<Vec<_>>().join("\n")
}

/// Reads a path or a tree of paths at the beginning of a text. Returns its length.
fn read_tree(text: &str, before: &[String], paths: &mut Vec<Vec<String>>) -> usize {
    let (mut path, mut at) = (before.to_vec(), 0);
    loop {
        let rest = &text[at..];
        let length = rest
            .find(|character: char| !character.is_alphanumeric() && character != '_')
            .unwrap_or(rest.len());
        if length > 0 {
            path.push(rest[..length].to_owned());
            at += length;
        }
        if !text[at..].starts_with("::") {
            break;
        }
        at += 2;
        if text[at..].starts_with('{') {
            at += 1;
            loop {
                at += text[at..].len() - text[at..].trim_start_matches([' ', '\n', ',']).len();
                if text[at..].is_empty() || text[at..].starts_with('}') {
                    return at + 1;
                }
                at += read_tree(&text[at..], &path, paths);
                // The rest of an item: `as name`, or `*`.
                at += text[at..].find([',', '}']).unwrap_or(text[at..].len());
            }
        }
    }
    paths.push(path);
    at
}

/// Lists all paths of a file that begin at its crate or relative to its module.
fn paths(text: &str) -> Vec<Vec<String>> {
    let code = program(text);
    let mut found = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            let is_whole = !code[..at].ends_with(|character: char| {
                character.is_alphanumeric() || ['_', ':', '$', '"'].contains(&character)
            });
            if is_whole {
                read_tree(&code[at..], &[], &mut found);
            }
        }
    }
    found
}

/// Lists the files of its own crate that a file uses. A `mod.rs` and the files below it are one module here.
fn imports(file: &Source, folder: &str, files: &BTreeSet<&str>) -> BTreeSet<String> {
    let own = module(&file.path, folder);
    let found = paths(&file.text).into_iter().filter_map(|path| {
        let ups = path.iter().take_while(|word| *word == "super").count();
        let rest = path.iter().skip(ups.max(1)).map(String::as_str);
        let start = match path[0].as_str() {
            "crate" => &own[..0],
            _ => own.get(..own.len().checked_sub(ups)?)?,
        };
        file_of(folder, &start.iter().copied().chain(rest).collect::<Vec<_>>(), files)
    });
    found
        .filter(|other| *other != file.path && !is_below(other, &file.path) && !is_below(&file.path, other))
        .collect()
}

/// Returns whether a file is in the folder of a `mod.rs`, or below it.
fn is_below(path: &str, parent: &str) -> bool {
    parent.strip_suffix("mod.rs").is_some_and(|folder| path.starts_with(folder))
}

/// Returns the files that are in a circle of imports, or between two circles, with what they import of each other.
fn circles(mut imports: BTreeMap<String, BTreeSet<String>>) -> BTreeMap<String, BTreeSet<String>> {
    loop {
        let before = imports.len();
        let names: BTreeSet<String> = imports.keys().cloned().collect();
        for others in imports.values_mut() {
            others.retain(|other| names.contains(other));
        }
        // A file that imports no file that is left, or that no file imports, is in no circle.
        let imported: BTreeSet<String> = imports.values().flatten().cloned().collect();
        imports.retain(|path, others| !others.is_empty() && imported.contains(path));
        if imports.len() == before {
            return imports;
        }
    }
}

#[test]
fn files_import_each_other_in_no_circle() {
    let all = sources();
    for folder in CRATES {
        let ours: Vec<&Source> = all.iter().filter(|file| crate_of(&file.path) == Some(folder)).collect();
        let files: BTreeSet<&str> = ours.iter().map(|file| file.path.as_str()).collect();
        let of = |file: &&Source| (file.path.clone(), imports(file, folder, &files));
        let all_imports: BTreeMap<String, BTreeSet<String>> = ours.iter().map(of).collect();
        assert!(all_imports.values().any(|others| !others.is_empty()), "no import was found in {folder}");
        let found = circles(all_imports);
        none(found.into_iter().map(|(path, others)| format!("{path} imports {others:?}")).collect());
    }
}

#[test]
fn paths_are_read_wherever_they_occur() {
    let text = "use crate::a::{self, b::C as D, e::{f, g}};\nuse super::h;\n// use crate::comment;\nfn i() {\n    \
                super::super::j::k::<u8>();\n    $crate::l();\n}\n\n#[cfg(test)]\nmod tests {\n    use crate::m;\n}\n";
    let found: BTreeSet<String> = paths(text).into_iter().map(|path| path.join("::")).collect();
    let expected = [
        "crate::a::self",
        "crate::a::b::C",
        "crate::a::e::f",
        "crate::a::e::g",
        "super::h",
        "super::super::j::k::",
    ];
    let expected = expected.map(|path| path.trim_end_matches(':').to_owned());
    assert_eq!(found, BTreeSet::from(expected));
}

#[test]
fn a_circle_is_found_and_a_child_of_a_module_is_none() {
    let source = |path: &str, text: &str| Source { path: path.to_owned(), text: text.to_owned() };
    let tree = |text: &str| {
        let all = [
            source("src/a.rs", "use crate::b::{c, D};\n"),
            source("src/b/mod.rs", "mod c;\nuse self::c::E;\n"),
            source("src/b/c.rs", text),
            source("src/f.rs", "use super::a;\n"),
        ];
        let files: BTreeSet<&str> = all.iter().map(|file| file.path.as_str()).collect();
        let found =
            circles(all.iter().map(|file| (file.path.clone(), imports(file, "src/", &files))).collect());
        found.into_keys().collect::<Vec<_>>()
    };
    assert_eq!(tree("use super::D;\n"), Vec::<String>::new());
    assert_eq!(tree("fn g() {\n    crate::a::h();\n}\n"), ["src/a.rs", "src/b/c.rs"]);
}
