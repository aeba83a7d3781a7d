//! The hostile web server: its answer depends on the path, and is always wrong.
//!
//! The test compiles it with `rustc` alone, statically, for an image of its own; it is not part of any crate.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

fn main() {
    let listener = TcpListener::bind("0.0.0.0:80").expect("bound");
    println!("web: listens");
    for stream in listener.incoming().flatten() {
        // The thread ends when the other side closes the connection, which the test is about.
        std::thread::spawn(move || drop(answer(stream)));
    }
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = String::new();
    BufReader::new(&stream).read_line(&mut head)?;
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    match path.as_str() {
        "/garbage" => endless(&mut stream, &[0xff; 65536]),
        "/nothing" => stream.read_to_end(&mut Vec::new()).map(drop),
        "/closed" => Ok(()),
        "/trickle" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: ")?;
            loop {
                stream.write_all(b"y")?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        "/headers" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n")?;
            endless(&mut stream, format!("X: {}\r\n", "y".repeat(9000)).as_bytes())
        }
        "/header" => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nX: ")?;
            endless(&mut stream, &[b'y'; 65536])
        }
        "/continue" => endless(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\n"),
        "/number" => stream.write_all(b"HTTP/1.1 99999999999999999999 OK\r\n\r\n"),
        "/redirect" => {
            stream.write_all(b"HTTP/1.1 302 Found\r\nLocation: /redirect\r\n\r\n")?;
            endless(&mut stream, &[b'z'; 65536])
        }
        _ => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")?;
            endless(&mut stream, &[b'z'; 65536])
        }
    }
}

fn endless(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        stream.write_all(bytes)?;
    }
}
