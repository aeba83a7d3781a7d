//! Entry points for fuzzers: bytes of a guest, cut into frames and taken by the streams that are open.

use futures::FutureExt;
use stead_schemas::api::CopyHeader;
use stead_schemas::guest::{Decoder, Frame, FromGuest, FromStream, Note, Request, Stat, Token};

use super::mux::{AgentStream, Mux};

/// Streams that are open while the frames come; their numbers count from 1.
const STREAMS: usize = 3;
/// Size of the caller's buffer, in bytes: small, so that frames are cut often.
const BUFFER_BYTES: usize = 64;

/// Cuts the input in both ways that the host has, which must agree, and gives every frame to the streams.
pub fn frames(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let cut = usize::from(cut).max(1);
    let mut decoder = Decoder::default();
    let (mut pushed, mut filled) = (Vec::new(), Vec::new());
    for part in stream.chunks(cut) {
        decoder.push(part);
        pushed.extend(std::iter::from_fn(|| decoder.next()));
    }
    let (mut decoder, mut rest) = (Decoder::default(), stream);
    let mut buffer = [0; BUFFER_BYTES];
    while !rest.is_empty() {
        decoder.give(vec![0xee; cut]);
        let mut count = 0;
        for target in decoder.targets(&mut buffer) {
            let part = target.len().min(rest.len()).min(cut);
            target[..part].copy_from_slice(&rest[..part]);
            (rest, count) = (&rest[part..], count + part);
            if part < target.len() {
                break;
            }
        }
        decoder.arrived(&buffer, count);
        filled.extend(std::iter::from_fn(|| decoder.next()));
    }
    assert_eq!(pushed, filled, "the two ways to cut a stream differ");
    take_all(pushed);
}

fn take_all(frames: Vec<Frame>) {
    let (mux, mut outgoing) = Mux::new(1);
    let token = Token("of this boot".to_owned());
    let open = || mux.open(&token, Request::Stat(Stat { path: "/".into(), follows_links: true }));
    let mut streams: Vec<AgentStream> = (0..STREAMS).filter_map(|_| open().now_or_never()?.ok()).collect();
    for frame in frames {
        if let Some(state) = frame.message::<FromGuest>() {
            mux.set_window(state.window);
        }
        drop(frame.message::<Note>());
        if let Some(FromStream::Entry(entry)) = frame.parse() {
            let _ = CopyHeader::of(entry);
        }
        mux.take(frame);
        if let Some(frame) = outgoing.next().now_or_never() {
            mux.is_wanted(&frame);
        }
    }
    for stream in &mut streams {
        while let Some(Some(_)) = stream.receiver.next().now_or_never() {}
    }
    mux.end_all();
}
