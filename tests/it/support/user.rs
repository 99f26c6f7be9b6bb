//! A user without privilege, of this test process's own, for limits that the kernel keeps by user.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;

/// A user id that nobody else has. Nothing of it stays behind.
pub struct User {
    id: u32,
}

/// So many pipes that the user's new ones have a page or two. Closed on drop.
pub struct UsedUp {
    _pipes: Vec<(OwnedFd, OwnedFd)>,
}

/// More would not fit the usual quota of 16,384 pages at one page each.
const PIPES_MAX: usize = 20_000;

impl User {
    /// One of a range that distributions give to nobody; or why this machine has none.
    pub fn new() -> Result<User, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can become another user".to_owned());
        }
        let user = User { id: 62_000 + std::process::id() % 3_000 };
        user.inside(|| ())?;
        Ok(user)
    }

    /// Runs `work` on a thread of this user.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, String> {
        let id = Uid::from_raw(self.id);
        let enter = move || match set_thread_res_uid(id, id, id) {
            Ok(()) => Ok(work()),
            Err(error) => Err(format!("cannot become user {}: {error}", id.as_raw())),
        };
        std::thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// A command that this user runs, in a directory that is made this user's.
    #[track_caller]
    pub fn command(&self, program: &Path, directory: &Path) -> Command {
        // The program itself may stand where the user may not look.
        let copy = directory.join(program.file_name().expect("a program has a name"));
        std::fs::copy(program, &copy).expect("the program is copied");
        std::os::unix::fs::chown(directory, Some(self.id), Some(self.id)).expect("root may give directories away");
        File::open(&copy).expect("the copy is there");
        let mut command = Command::new(copy);
        command.uid(self.id).gid(self.id);
        command
    }

    /// Size of a new pipe.
    #[track_caller]
    pub fn pipe_bytes(&self) -> usize {
        let (pipe, _other) = self.inside(new_pipe).and_then(|pipe| pipe).expect("past the quota pipes are small");
        fcntl_getpipe_size(&pipe).expect("a pipe has a size")
    }

    /// Makes pipes until the user's quota is reached; or why that cannot be here.
    pub fn use_up_pipes(&self) -> Result<UsedUp, String> {
        self.inside(|| {
            let mut pipes = Vec::new();
            while pipes.len() < PIPES_MAX {
                let pipe = new_pipe()?;
                if fcntl_getpipe_size(&pipe.0).is_ok_and(|bytes| bytes < 64 * 1024) {
                    return Ok(UsedUp { _pipes: pipes });
                }
                // As large as the quota allows: fewer descriptors are needed then.
                let _ = fcntl_setpipe_size(&pipe.0, 1 << 20);
                pipes.push(pipe);
            }
            Err(format!("{PIPES_MAX} pipes did not reach a quota: fs.pipe-user-pages-soft is off"))
        })?
    }
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd), String> {
    pipe_with(PipeFlags::CLOEXEC).map_err(|error| format!("no pipe: {error}"))
}
