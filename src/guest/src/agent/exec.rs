//! Runs a program for the host: one thread, one loop over input, output, the program's end and the deadlines.
//!
//! Guarantees: everything that the program wrote before it ended is sent before its end is reported. Processes that
//! it left in the background keep no stream open. A program whose host went away, or whose time is over, is asked to
//! end and then killed with its process group.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};
use rustix::termios::{Winsize, tcsetwinsize};
use stead_schemas::guest::{Exec, FrameKind, FromStream, ToStream};
use stead_schemas::signal;

use super::Instance;
use super::stream::{Input, SENT_BYTES_MAX, Stream};
use crate::program;
use crate::user;

/// Time between the request to end and the kill.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Exit code of a program that ran out of time, as reported by `timeout` of coreutils.
const TIMED_OUT: i32 = 124;
const ROWS: u16 = 24;
const COLUMNS: u16 = 80;
/// Character that a terminal takes for the end of input (`^D`).
const END_OF_INPUT: u8 = 4;

pub(super) fn run(stream: &Arc<Stream>, request: &Exec, instance: &Instance) {
    match start(stream, request, instance) {
        Ok(session) => session.run(),
        Err((code, message)) => stream.failed(message, Some(code), None),
    }
}

/// A running program and this side's ends of its pipes.
struct Session<'a> {
    stream: &'a Arc<Stream>,
    instance: &'a Instance,
    pid: Pid,
    end: Arc<OnceLock<WaitStatus>>,
    input: Option<File>,
    /// Bytes that were taken from the stream and not yet by the program.
    pending: VecDeque<u8>,
    is_input_over: bool,
    outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
    deadline: Option<Instant>,
    kill_at: Option<Instant>,
    is_timed_out: bool,
}

struct Output {
    kind: FrameKind,
    file: File,
}

fn start<'a>(
    stream: &'a Arc<Stream>,
    request: &Exec,
    instance: &'a Instance,
) -> Result<Session<'a>, (i32, String)> {
    let config = &instance.config;
    let cannot = |message: String| (program::NOT_EXECUTABLE, message);
    let (name, arguments) =
        request.command.split_first().ok_or_else(|| (program::NOT_FOUND, "no command given".to_owned()))?;
    let user = user::look_up(request.user.as_deref().unwrap_or(&config.user)).map_err(cannot)?;
    let directory = program::absolute(request.directory.as_deref().unwrap_or(&config.working_dir));
    if !std::fs::metadata(&directory).is_ok_and(|meta| meta.is_dir()) {
        return Err(cannot(format!("working directory {directory}: there is no such directory")));
    }
    let mut environment = program::environment(config, &user);
    if request.has_terminal && !config.env.contains_key("TERM") {
        environment.push(("TERM".to_owned(), "xterm".to_owned()));
    }
    environment.extend(request.env.iter().map(|(key, value)| (key.clone(), value.0.clone())));
    let mut command = Command::new(name);
    command.args(arguments).env_clear().envs(environment).current_dir(&directory);
    let pipes = if request.has_terminal { Pipes::terminal(request) } else { Pipes::plain(request.is_split) };
    let pipes = pipes.map_err(|error| cannot(format!("pipes: {error}")))?;
    let ours = pipes.attach(&mut command, user.uid);
    program::set_user(&mut command, user, request.has_terminal);
    let end = Arc::new(OnceLock::new());
    let (for_reaper, to_wake) = (end.clone(), stream.clone());
    let started = instance.children.spawn(&mut command, move |status| {
        // This is called once for each child, so the cell is still empty.
        let _ = for_reaper.set(status);
        to_wake.poke();
    });
    // Our copies of the program's pipe ends are closed now: an output ends when its last writer has closed it.
    drop(command);
    let pid = started.map_err(|error| program::start_error(name, &error))?;
    let deadline = request.timeout_millis.map(|millis| Instant::now() + Duration::from_millis(millis));
    Ok(Session {
        stream,
        instance,
        pid,
        end,
        input: Some(ours.input),
        pending: VecDeque::new(),
        is_input_over: false,
        outputs: ours.outputs,
        terminal: ours.terminal,
        deadline,
        kill_at: None,
        is_timed_out: false,
    })
}

/// The two ends of the pipes or of the terminal that connects a program.
struct Pipes {
    ours: Ours,
    theirs: [OwnedFd; 3],
}

struct Ours {
    input: File,
    outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
}

impl Pipes {
    fn plain(is_split: bool) -> io::Result<Self> {
        let (their_input, input) = io::pipe()?;
        let (output, their_output) = io::pipe()?;
        let mut outputs = vec![Output { kind: FrameKind::Data, file: OwnedFd::from(output).into() }];
        let their_error: OwnedFd = if is_split {
            let (error, their_error) = io::pipe()?;
            outputs.push(Output { kind: FrameKind::ErrorData, file: OwnedFd::from(error).into() });
            their_error.into()
        } else {
            their_output.try_clone()?.into()
        };
        let input: File = OwnedFd::from(input).into();
        set_nonblocking(&input)?;
        for output in &outputs {
            set_nonblocking(&output.file)?;
        }
        let theirs = [their_input.into(), their_output.into(), their_error];
        Ok(Self { ours: Ours { input, outputs, terminal: None }, theirs })
    }

    fn terminal(request: &Exec) -> io::Result<Self> {
        use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        unlockpt(&master)?;
        let theirs = ioctl_tiocgptpeer(&master, flags)?;
        resize(&master, request.rows, request.columns);
        let file: File = master.try_clone()?.into();
        set_nonblocking(&file)?;
        let outputs = vec![Output { kind: FrameKind::Data, file: file.try_clone()? }];
        let theirs = [theirs.try_clone()?, theirs.try_clone()?, theirs];
        Ok(Self { ours: Ours { input: file, outputs, terminal: Some(master) }, theirs })
    }

    fn attach(self, command: &mut Command, uid: u32) -> Ours {
        self.theirs.iter().for_each(|file| program::give_to(file, uid));
        let [input, output, error] = self.theirs.map(Stdio::from);
        command.stdin(input).stdout(output).stderr(error);
        self.ours
    }
}

fn set_nonblocking(file: &File) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    Ok(fcntl_setfl(file, fcntl_getfl(file)? | OFlags::NONBLOCK)?)
}

fn resize(terminal: impl AsFd, rows: u16, columns: u16) {
    let or = |given: u16, usual: u16| if given == 0 { usual } else { given };
    let size = Winsize { ws_row: or(rows, ROWS), ws_col: or(columns, COLUMNS), ws_xpixel: 0, ws_ypixel: 0 };
    let _ = tcsetwinsize(terminal, size);
}

impl Session<'_> {
    fn run(mut self) {
        loop {
            self.take_inputs();
            self.feed();
            // The end is read before the outputs, so that everything written before the end is read after it.
            let end = self.end.get().copied();
            let has_moved = self.pump_outputs();
            if let Some(end) = end
                && !has_moved
                && (self.stream.credit() > 0 || self.stream.is_closed())
            {
                return self.report(end);
            }
            self.keep_deadlines();
            if !has_moved {
                self.wait();
            }
        }
    }

    fn take_inputs(&mut self) {
        while let Some(input) = self.stream.next() {
            match input {
                Input::Data(bytes) if self.input.is_some() => self.pending.extend(bytes),
                // No process reads the input any more, and the host may go on sending. The bytes are only credited.
                Input::Data(bytes) => self.stream.done_with(bytes),
                Input::Eof => {
                    self.is_input_over = true;
                    if self.terminal.is_some() {
                        self.pending.push_back(END_OF_INPUT);
                    }
                }
                Input::Message(ToStream::Resize { rows, columns }) => {
                    if let Some(terminal) = &self.terminal {
                        resize(terminal, rows, columns);
                    }
                }
                Input::Message(ToStream::Signal { name }) => {
                    // The host passes on only known signal names.
                    if let Some(number) = signal::number(&name) {
                        self.instance.children.signal_group(self.pid, program::signal_of(number));
                    }
                }
            }
        }
    }

    /// Writes the pending input, and the end of input when all of it was taken.
    fn feed(&mut self) {
        while let Some(input) = &mut self.input {
            let (front, _) = self.pending.as_slices();
            if front.is_empty() {
                // A terminal stays open: its other direction is the output.
                if self.is_input_over && self.terminal.is_none() {
                    self.input = None;
                }
                return;
            }
            match input.write(front) {
                Ok(count) => {
                    self.pending.drain(..count);
                    self.stream.consumed(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.stream.consumed(self.pending.len());
                    self.pending.clear();
                    self.input = None;
                }
            }
        }
    }

    /// Sends what can be read now. Returns `true` if anything was read.
    fn pump_outputs(&mut self) -> bool {
        let mut has_moved = false;
        let is_closed = self.stream.is_closed();
        let stream = self.stream;
        self.outputs.retain_mut(|output| {
            // The output of a closed stream is read and dropped, so that the program does not block on it.
            let room = if is_closed { SENT_BYTES_MAX } else { stream.credit() };
            if room == 0 {
                return true;
            }
            let mut frame = stream.data_begun(output.kind, room);
            match rustix::io::read(&output.file, spare_capacity(&mut frame)) {
                Ok(0) => false,
                Ok(_) => {
                    has_moved = true;
                    stream.data_read(frame);
                    true
                }
                Err(error) => {
                    stream.data_dropped(frame);
                    matches!(error, Errno::AGAIN | Errno::INTR)
                }
            }
        });
        has_moved
    }

    fn keep_deadlines(&mut self) {
        let now = Instant::now();
        let is_late = self.deadline.is_some_and(|deadline| now >= deadline);
        match self.kill_at {
            None if is_late || self.stream.is_closed() => {
                self.is_timed_out = is_late && !self.stream.is_closed();
                // The loss of a terminal is a hang-up; any other program is asked to end.
                let signal = if self.terminal.is_some() { Signal::HUP } else { Signal::TERM };
                self.instance.children.signal_group(self.pid, signal);
                self.kill_at = Some(now + KILL_GRACE);
            }
            Some(at) if now >= at => {
                self.instance.children.signal_group(self.pid, Signal::KILL);
                self.kill_at = Some(now + KILL_GRACE);
            }
            _ => {}
        }
    }

    fn wait(&self) {
        let next =
            [self.deadline.filter(|_| self.kill_at.is_none()), self.kill_at].into_iter().flatten().min();
        let timeout = next.map(|at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec::try_from(left).unwrap_or_default()
        });
        let has_room = self.stream.is_closed() || self.stream.credit() > 0;
        let mut fds = vec![PollFd::from_borrowed_fd(self.stream.wake_fd(), PollFlags::IN)];
        if has_room {
            fds.extend(self.outputs.iter().map(|output| PollFd::new(&output.file, PollFlags::IN)));
        }
        if let Some(input) = self.input.as_ref().filter(|_| !self.pending.is_empty()) {
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        let _ = poll(&mut fds, timeout.as_ref());
    }

    fn report(&self, end: WaitStatus) {
        let code = match end.terminating_signal() {
            _ if self.is_timed_out => TIMED_OUT,
            Some(signal) => 128 + signal,
            None => end.exit_status().unwrap_or(-1),
        };
        self.stream.message(&FromStream::Exited { code });
    }
}
