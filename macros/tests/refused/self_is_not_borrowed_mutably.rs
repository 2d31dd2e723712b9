#[hopline::service]
trait Demo {
    async fn put(&mut self);
}

fn main() {}
