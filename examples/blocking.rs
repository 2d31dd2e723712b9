//! A program without async code: a plain thread can wait for every operation.

use hopline::{Client, Context, Error, Fault, Server, Service, blocking};

fn main() -> Result<(), Error> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());

    let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
    let service = Service::new("blocking", 1).method("add", add);
    let server = blocking::wait(blocking::wait(Server::connect(&url))?.serve(service).start())?;

    let client = blocking::wait(Client::connect(&url))?;
    let sum: i64 = blocking::wait(client.call("blocking", "add", (2, 3)))?;
    println!("add(2, 3) = {sum}");

    // Several at once: start them, then collect.
    let started: Result<Vec<_>, Error> =
        (1..=3_i64).map(|n| blocking::wait(client.call::<i64>("blocking", "add", (n, n)).start())).collect();
    for pending in started? {
        println!("one of several = {}", blocking::wait(pending)?);
    }

    blocking::wait(server.drain());
    Ok(())
}
