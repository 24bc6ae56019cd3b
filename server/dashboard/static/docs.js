// The description of the API, made into a page on which it can be tried.
"use strict";

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "/openapi.json",
  deepLinking: true,
  displayRequestDuration: true,
  // Else the validator's badge would ask a server of somebody else.
  validatorUrl: null,
});
