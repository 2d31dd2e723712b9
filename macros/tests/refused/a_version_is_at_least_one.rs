#[hopline::service(version = 0)]
trait Demo {
    async fn put(&self);
}

fn main() {}
