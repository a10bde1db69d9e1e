mod redacting;
mod rules;
mod scanning;
mod tools;
